"""Shared prompts draw what plain waves draw, on every architecture, whatever the batching."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from gruppo import native
from gruppo.engine.local import LocalEngine, shared
from gruppo.engine.local.packed import packed_linears
from gruppo.model.attention import adopt
from gruppo.types import Completion, Request, Sampling
from support.engines import TINY, letters, sharpen, unequal_groups

SHARING: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mistral": {"sliding_window": 6},
    "phi3": {},
    "gemma2": {
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "olmo2": {},
}


def build(name: str, extra: dict[str, object]) -> nn.Module:
    config = CONFIG_MAPPING[name](**{**TINY, **extra})
    torch.manual_seed(0)
    return sharpen(AutoModelForCausalLM.from_config(config))


SAMPLING = Sampling(max_tokens=12, temperature=0.9, stop_tokens=(5, 17, 40, 60))


def assert_same(left: list[tuple[Completion, ...]], right: list[tuple[Completion, ...]]) -> None:
    for ours, theirs in zip(left, right, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one.tokens, one.finish) == (other.tokens, other.finish)
            assert one.logp == pytest.approx(other.logp, abs=2e-5)


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("compiled", [True, False], ids=["native", "torch"])
def test_equals_plain_waves(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        for module in (native.attention, native.sampling, native):
            monkeypatch.setattr(module, "kernels", lambda: None)
    elif native.kernels() is None:
        pytest.skip("no C++ compiler here")
    model = build(name, SHARING[name])
    expected = LocalEngine(model, letters, pad_token=0, kind="plain").generate(
        unequal_groups(), SAMPLING
    )
    assert adopt(model)
    for rows, tokens in ((128, None), (4, None), (1, None), (6, 60)):
        engine = LocalEngine(model, letters, pad_token=0, max_rows=rows, max_cached_tokens=tokens)
        assert engine.is_shared
        assert_same(engine.generate(unequal_groups(), SAMPLING), expected)


def test_prompts_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", {})
    adopt(model)
    engine = LocalEngine(model, letters, pad_token=0)
    whole = engine.generate(unequal_groups(), SAMPLING)
    for width in (1, 3, 5, 12):
        monkeypatch.setattr(shared, "PREFILL_TOKENS", width)
        assert_same(engine.generate(unequal_groups(), SAMPLING), whole)


@pytest.mark.parametrize(
    ("name", "extra"),
    [("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}), ("lfm2", {})],
)
def test_other_models_take_the_plain_path(name: str, extra: dict[str, object]) -> None:
    model = build(
        name, extra | ({"layer_types": ["conv", "full_attention"]} if extra == {} else {})
    )
    expected = LocalEngine(model, letters, pad_token=0, kind="plain").generate(
        unequal_groups(), SAMPLING
    )
    adopt(model)
    engine = LocalEngine(model, letters, pad_token=0)
    assert engine.is_shared == (name == "gpt2")
    assert_same(engine.generate(unequal_groups(), SAMPLING), expected)


def test_memory_holds_a_prompt_once() -> None:
    """2 layers x keys and values x 2 heads x width 8 x 4 bytes = 256 bytes a column and row."""
    model = build("llama", {})
    adopt(model)
    engine = LocalEngine(model, letters, pad_token=0)
    one = Request(tokens=tuple(range(3, 43)), num_samples=6, key=(0, 0))
    engine.generate([one], Sampling(max_tokens=20))
    assert engine.peak_cache_bytes == 256 * (40 + 6 * 128)  # own columns come by 128


def test_packed_weights_give_the_same_products() -> None:
    model = build("qwen2", {})  # with biases
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with torch.no_grad():
        before = model(ids).logits
        with packed_linears(model, None, rows=2):
            inside = model(ids).logits
        after = model(ids).logits
    assert torch.allclose(inside, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert torch.equal(after, before)


def test_abort_returns_what_there_is() -> None:
    model = build("llama", {})
    adopt(model)
    calls: list[int] = []

    def decode(tokens: object) -> str:
        calls.append(1)
        if len(calls) == 9:  # 3 rows a turn are looked at for the stop string
            engine.abort()
        return ""

    engine = LocalEngine(model, decode, pad_token=0, max_rows=3)
    asked = [Request(tokens=(3, 4), num_samples=5, key=(0, 0))]
    group = engine.generate(asked, Sampling(max_tokens=12, stop=("never",)))[0]
    assert [len(c.tokens) for c in group] == [3, 3, 3, 0, 0]
    assert {c.finish for c in group} == {"abort"}
    calls.extend([1] * 9)
    again = engine.generate(asked, Sampling(max_tokens=12, stop=("never",)))[0]
    assert [len(c.tokens) for c in again] == [12] * 5
