"""Captured decode steps draw what the others draw; only the device's work is replayed."""

import logging

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from gruppo.engine.local import LocalEngine, engine
from gruppo.engine.local.halves import Halves
from gruppo.model.adapter import Lora, attach
from gruppo.model.attention import adopt
from gruppo.types import Completion, Request, Sampling
from support.engines import TINY, letters, sharpen
from support.tape import Tape

SHAPES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {  # soft caps
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
SAMPLING = Sampling(max_tokens=8, temperature=0.9, stop_tokens=(5, 17, 40, 60))
FULL = Sampling(max_tokens=4, temperature=0.9)
BRIEF = Sampling(max_tokens=6, temperature=0.9)


def build(name: str = "llama", **extra: object) -> nn.Module:
    config = CONFIG_MAPPING[name](**{**TINY, **SHAPES.get(name, {}), **extra})
    torch.manual_seed(0)
    model = sharpen(AutoModelForCausalLM.from_config(config))
    assert adopt(model)
    return model


def requests(*groups: tuple[int, int]) -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    return [
        Request(
            tokens=tuple(torch.randint(3, 97, (length,), generator=generator).tolist()),
            num_samples=count,
            key=(0, index),
        )
        for index, (length, count) in enumerate(groups)
    ]


UNEQUAL = requests((9, 2), (4, 6), (13, 1))


def taped(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, tape: Tape, **options: object
) -> LocalEngine:
    monkeypatch.setattr(engine, "capture_for", lambda device: tape)
    return LocalEngine(model, letters, pad_token=0, **options)


def assert_same(
    left: list[tuple[Completion, ...]], right: list[tuple[Completion, ...]], error: float = 2e-5
) -> None:
    for ours, theirs in zip(left, right, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one.tokens, one.finish) == (other.tokens, other.finish)
            assert one.logp == pytest.approx(other.logp, abs=error)


def check_parity(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    expected = LocalEngine(model, letters, pad_token=0).generate(UNEQUAL, SAMPLING)
    tape = Tape()
    ours = taped(monkeypatch, model, tape, max_rows=rows)
    assert_same(ours.generate(UNEQUAL, SAMPLING), expected)
    turns, records = tape.plays, tape.records
    assert turns >= 7  # a completion of 8 tokens decodes 7
    assert records <= 10  # of the buckets of at most 16 rows
    assert_same(ours.generate(UNEQUAL, SAMPLING), expected)
    assert (tape.records, tape.plays) == (records, 2 * turns)  # nothing is captured again


@pytest.mark.parametrize(("name", "rows"), [("gemma2", 128), ("llama", 3)])
def test_replays_draw_the_same(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once, and rows that enter as others leave."""
    check_parity(name, rows, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [128, 3, 1])
def test_replays_of_every_model(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_parity(name, rows, monkeypatch)


@pytest.mark.slow
def test_buffers_grow_across_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of 0 keeps nothing and grows by 128, 256 and 384 columns."""
    model = build(max_position_embeddings=512)
    long = Sampling(max_tokens=300, temperature=0.9)
    asked = requests((70, 2), (3, 1))
    expected = LocalEngine(model, letters, pad_token=0).generate(asked, long)
    tape = Tape(budget=0)
    ours = taped(monkeypatch, model, tape)
    assert_same(ours.generate(asked, long), expected, error=1e-4)
    assert (tape.records, tape.plays) == (3, 299)
    # 256 bytes a column and row: 4 slots; 8 places of 128; inputs; logits of 97 in float32
    assert ours.peak_cache_bytes == 256 * (4 * 384 + 8 * 128) + 8 * 11 * 4 + 4 * 4 * 97


def test_captures_end_when_weights_move(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    tape = Tape()
    ours = taped(monkeypatch, model, tape)
    asked = requests((4, 2))
    first = ours.generate(asked, FULL)
    once = tape.records
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)  # in place, as an optimizer does
    changed = ours.generate(asked, FULL)
    assert tape.records == once
    assert changed[0][0].logp != first[0][0].logp
    assert_same(
        changed, LocalEngine(model, letters, pad_token=0, kind="plain").generate(asked, FULL)
    )
    head = model.get_output_embeddings().weight
    head.data = head.data.clone() * 0.9
    moved = ours.generate(asked, FULL)
    assert tape.records > once
    assert_same(moved, LocalEngine(model, letters, pad_token=0, kind="plain").generate(asked, FULL))


def test_captures_end_when_an_adapter_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    model = attach(build(), Lora(rank=2), compute_dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    ours = taped(monkeypatch, model, Tape())
    asked = requests((4, 2))
    on = ours.generate(asked, FULL)
    with model.disable_adapter():
        off = ours.generate(asked, FULL)
        assert_same(
            off, LocalEngine(model, letters, pad_token=0, kind="plain").generate(asked, FULL)
        )
    assert on[0][0].logp != off[0][0].logp
    assert_same(ours.generate(asked, FULL), on)


def rescored(model: nn.Module, request: Request, one: Completion) -> Tensor:
    """The model's own log-probabilities of a completion's tokens, under autocast."""
    ids, start = torch.tensor([[*request.tokens, *one.tokens]]), len(request.tokens)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits[0, start - 1 : -1].float()
    full = torch.log_softmax(logits / BRIEF.temperature, -1)
    return full.gather(1, ids[0, start:, None])[:, 0]


def test_sixteen_bit_copies_follow_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept captures draw what new ones draw; five decode steps are as likely as the model says."""
    model = build()
    ours = taped(monkeypatch, model, Tape(), compute_dtype=torch.bfloat16)
    asked = requests((4, 2), (6, 1))
    ours.generate(asked, BRIEF)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.2)  # copies of the old ones would be more than 1 off
    theirs = taped(monkeypatch, model, Tape(), compute_dtype=torch.bfloat16)
    drawn = ours.generate(asked, BRIEF)
    assert_same(drawn, theirs.generate(asked, BRIEF), error=0)
    for request, group in zip(asked, drawn, strict=True):
        for one in group:
            assert len(one.tokens) == 6
            wanted = rescored(model, request, one)
            assert (torch.tensor(one.logp) - wanted).abs().max() < 0.1  # rounded at other places
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_products_by_sixteen_bit_copies_are_autocasts() -> None:
    """To the bit, at the same addresses after the weights have changed; outside, nothing stays."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(24, 33), nn.Linear(24, 7, bias=False)])
    rows, halves, places = torch.randn(5, 24), Halves(), []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            outside = [layer(rows) for layer in layers]
            with halves.standing_in(layers, torch.bfloat16):
                inside = [layer(rows) for layer in layers]
                with torch.autocast("cpu", enabled=False):
                    single = layers[0](rows)
            places.append(halves.addresses)
            for ours, theirs in zip(inside, outside, strict=True):
                assert ours.dtype == torch.bfloat16
                assert torch.equal(ours, theirs)
        with torch.no_grad():
            assert torch.equal(single, layers[0](rows))
            for weight in layers.parameters():
                weight.mul_(1.3)
        assert "forward" not in vars(layers[0])
    assert places[0] == places[1]


def test_a_model_that_cannot_be_captured_draws_as_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that asks the device for a number."""
    model = build()
    model.model.norm.register_forward_hook(
        lambda module, args, output: output * output.sum().sign().abs().item()
    )
    asked = requests((4, 2))
    expected = LocalEngine(model, letters, pad_token=0).generate(asked, FULL)
    tape = Tape()
    ours = taped(monkeypatch, model, tape)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(ours.generate(asked, FULL), expected)
    assert tape.plays == 0
    told = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert told == [
        "decoding without CUDA graphs: this model has none "
        "(called a synchronizing operation: _local_scalar_dense)"
    ]


def test_nothing_broken_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    ours = taped(monkeypatch, model, Tape())
    asked = requests((4, 2))
    expected = ours.generate(asked, FULL)
    weight = model.get_input_embeddings().weight
    whole = weight.detach().clone()
    with torch.no_grad():
        weight[:] = float("nan")
    with pytest.raises(FloatingPointError, match="logits hold NaN"):
        ours.generate(asked, FULL)
    with torch.no_grad():
        weight.copy_(whole)
    assert_same(ours.generate(asked, FULL), expected)


def test_close_frees_what_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    tape = Tape()
    ours = taped(monkeypatch, build(), tape)
    ours.generate(requests((4, 2)), FULL)
    before = tape.forgotten
    ours.close()
    assert tape.forgotten == before + 1
    with pytest.raises(ValueError, match="closed"):
        ours.generate(requests((4, 2)), FULL)
