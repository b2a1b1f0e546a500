"""Activations kept from sampling: a training pass over them gives what it gives without."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from gruppo import native
from gruppo.cli import main
from gruppo.engine import LocalEngine
from gruppo.model import Activations, Lora, attach, completion_logp, multiplying
from gruppo.model.activations import _firsts
from gruppo.model.decoder import find_decoder
from gruppo.model.packing import pack
from gruppo.policy import Optim, Policy
from gruppo.record import Database
from gruppo.types import Completion, Request, Sampling
from support.commands import arguments
from support.engines import letters, unequal_groups
from support.passes import build, gap, needs_kernels

pytestmark = needs_kernels
ROOM = 2**24
STOPS = (5, 11, 17, 23, 29)


@dataclass(frozen=True)
class Drawn:
    """What was drawn, as the training pass takes it."""

    prompts: list[tuple[int, ...]]
    tokens: torch.Tensor
    counts: list[int]
    completions: list[Completion]

    @classmethod
    def of(cls, requests: list[Request], groups: list[tuple[Completion, ...]]) -> "Drawn":
        rows = [completion for group in groups for completion in group]
        tokens = torch.zeros(len(rows), max(len(row.tokens) for row in rows), dtype=torch.long)
        for row, completion in enumerate(rows):
            tokens[row, : len(completion.tokens)] = torch.tensor(completion.tokens)
        return cls(
            [r.tokens for r, group in zip(requests, groups, strict=True) for _ in group],
            tokens,
            [len(row.tokens) for row in rows],
            rows,
        )

    def known(self, activations: Activations, model: nn.Module):
        return activations.find(
            pack(self.prompts, self.tokens, self.counts),
            self.prompts,
            self.tokens,
            self.counts,
            weights=find_decoder(model).marks,
        )


def draw(model: nn.Module, activations: Activations | None, **settings) -> Drawn:
    """Rows that end at different steps, more than run at once, in groups of unequal size."""
    options = {"max_rows": 4, "products": "native"} | settings
    engine = LocalEngine(model, letters, pad_token=0, activations=activations, **options)
    requests = unequal_groups()
    sampling = Sampling(max_tokens=40, stop_tokens=STOPS)
    return Drawn.of(requests, engine.generate(requests, sampling))


def outcome(model: nn.Module, drawn: Drawn, activations: Activations | None, *, half=False):
    """Log-probabilities and all gradients of a weighted sum."""
    torch.manual_seed(1)
    weights = torch.randn(drawn.tokens.shape)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half), multiplying("native"):
        scored = completion_logp(
            model,
            drawn.prompts,
            drawn.tokens,
            torch.tensor(drawn.counts),
            packed=True,
            fused=True,
            activations=activations,
        )
        (scored.logp * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logp": scored.logp.detach()} | grads


def opened(size: int = ROOM) -> Activations:
    activations = Activations(size)
    activations.open()
    return activations


def adapted(rank: int) -> nn.Module:
    """An adapter that has been trained: B is not 0."""
    pytest.importorskip("peft")
    model = attach(build("llama"), Lora(rank=rank, alpha=7.0), compute_dtype=torch.float32)
    torch.manual_seed(2)
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if "lora_B" in place:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "adapter"])
def test_log_probabilities_and_gradients(name):
    model, activations = adapted(3) if name == "adapter" else build(name), opened()
    drawn = draw(model, activations)
    assert len(set(drawn.counts)) > 3, "they end at different steps"
    known = drawn.known(activations, model)
    assert known is not None
    prompts = [9, 4, 13, 2]  # of those groups
    assert len(known.rest) == sum(prompts)
    assert activations.num_tokens == sum(count - 1 for count in drawn.counts)
    assert sorted(set(known.at.tolist())) == list(range(activations.num_tokens))
    mine, plain = outcome(model, drawn, activations), outcome(model, drawn, None)
    assert gap(mine, plain) < 2e-5


def test_they_are_what_is_computed_with():
    """Of results that are no numbers nothing that is one can come."""
    model, activations = build("llama"), opened()
    drawn = draw(model, activations)
    known = drawn.known(activations, model)
    for layer in known.results:
        layer[2].fill_(torch.nan)  # gates: needed on the way back alone
    found = outcome(model, drawn, activations)
    assert not found["logp"].isnan().any()
    assert found["model.layers.0.mlp.gate_proj.weight"].isnan().all()
    for layer in known.results:
        layer[3].fill_(torch.nan)
    logp = outcome(model, drawn, activations)["logp"]
    first = torch.arange(logp.shape[1]) == 0  # what a prompt predicts is not known
    assert not logp[:, first].isnan().any()
    read = torch.arange(logp.shape[1]) < torch.tensor(drawn.counts)[:, None]
    assert logp[read & ~first].isnan().all()


def test_what_is_drawn_does_not_depend_on_it():
    model, activations = build("llama"), opened()
    drawn, plain = draw(model, activations), draw(model, None)
    assert drawn.completions == plain.completions


@pytest.mark.parametrize("tokens", [0, 1, 23, 60])
def test_where_room_ends_the_rest_is_computed(tokens):
    """By float32 numbers a token: 2 layers of 64 + 32 + 96 + 32."""
    model = build("llama")
    activations = opened(tokens * 2 * (64 + 32 + 96 + 32) * 4)
    drawn = draw(model, activations)
    assert tokens - 4 < activations.num_tokens <= tokens, "rows come together"
    known = drawn.known(activations, model)
    assert (known is None) == (activations.num_tokens == 0)
    if known is not None:
        assert len(known.at) - len(known.rest) == activations.num_tokens
    assert gap(outcome(model, drawn, activations), outcome(model, drawn, None)) < 2e-5


def test_some_completions_beside_others():
    """A row of one that was drawn and another of the same group that was not."""
    model, activations = build("llama"), opened()
    drawn = draw(model, activations)
    tokens = drawn.tokens.clone()
    tokens[1] = (tokens[1] + 1) % 97
    other = Drawn(drawn.prompts, tokens, drawn.counts, [])
    known, packing = other.known(activations, model), pack(other.prompts, tokens, other.counts)
    strange = _firsts(packing)[1]
    assert len(known.rest) == 9 + 4 + 13 + 2 + drawn.counts[1] - 1
    assert strange in known.rest
    assert gap(outcome(model, other, activations), outcome(model, other, None)) < 2e-5


def test_in_bfloat16_the_policy_is_the_one_that_has_drawn():
    """All that rounds otherwise is left out: what is trained says what the engine said."""
    if not native.can_multiply(torch.bfloat16):
        pytest.skip("no native bfloat16 products here")
    model, activations = build("llama"), opened()
    drawn = draw(model, activations, compute_dtype=torch.bfloat16)
    told = torch.zeros(drawn.tokens.shape)
    for row, completion in enumerate(drawn.completions):
        told[row, : len(completion.tokens)] = torch.tensor(completion.logp)
    later = torch.arange(told.shape[1]) > 0
    mine, plain = (
        (outcome(model, drawn, kept, half=True)["logp"] - told)[:, later].abs().max()
        for kept in (activations, None)
    )
    assert plain > 1e-3
    assert mine < plain / 3


def policy(model: nn.Module, activations: Activations) -> Policy:
    return Policy(model, optim=Optim(), total_updates=3, products="native", activations=activations)


def change(how: str, model: nn.Module, activations: Activations) -> None:
    """Other weights than those that have drawn, in one of many ways."""
    state = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    if how == "optimizer":
        trained = policy(model, activations)
        trained.backward(trained.logp([(5, 6)], torch.tensor([[7]]), torch.tensor([1])).logp.sum())
        trained.step()
    elif how == "restored":
        trained = policy(model, activations)
        tensors, scalars = trained.state()
        trained.restore({name: tensor * 1.5 for name, tensor in tensors.items()}, scalars)
    elif how == "loaded":
        model.load_state_dict(state)
    elif how == "given to the engine":
        LocalEngine(model, letters, pad_token=0).load(state, 1)
    else:
        model.disable_adapter_layers()


@pytest.mark.parametrize(
    "how", ["optimizer", "restored", "loaded", "given to the engine", "adapter off"]
)
def test_what_other_weights_computed_is_not_taken(how):
    model, activations = adapted(4) if how == "adapter off" else build("llama"), opened()
    drawn = draw(model, activations)
    assert drawn.known(activations, model) is not None
    change(how, model, activations)
    assert drawn.known(activations, model) is None
    assert drawn.known(activations, build("llama")) is None, "of another module neither"


def test_another_type_of_products_is_not_taken():
    model, activations = build("llama"), opened()
    drawn = draw(model, activations)
    assert torch.equal(
        outcome(model, drawn, activations, half=True)["logp"],
        outcome(model, drawn, None, half=True)["logp"],
    )


def test_several_calls_of_a_step_add_up():
    """As for groups that are drawn again; equal completions are known by the longer part."""
    model, activations = build("llama"), opened()
    first, second = draw(model, activations), draw(model, activations)
    total = sum(count - 1 for count in first.counts)
    assert activations.num_tokens == 2 * total
    assert len(second.known(activations, model).rest) == 28
    activations.add(first.prompts[0], first.completions[0].tokens, [0])
    assert len(first.known(activations, model).rest) == 28


def test_an_engine_that_runs_out_of_memory_gives_its_room_back(monkeypatch):
    model, activations = build("llama"), opened()
    step, calls = native.DecodeLayers.step, []

    def breaks(self, *given, **more):
        calls.append(1)
        if len(calls) == 20:
            raise MemoryError("no room for what lies between the layers")
        return step(self, *given, **more)

    monkeypatch.setattr(native.DecodeLayers, "step", breaks)
    drawn = draw(model, activations)
    assert len(calls) > 40, "drawn again, fewer at once"
    assert activations.num_tokens == sum(count - 1 for count in drawn.counts)
    assert len(drawn.known(activations, model).rest) == 28


def test_what_is_cut_off_is_known_as_far_as_it_came():
    """Aborted at the tenth step."""
    model, activations = build("llama"), opened()
    engine = LocalEngine(
        model, letters, pad_token=0, products="native", activations=activations, max_rows=4
    )
    reserve, calls = activations.reserve, []

    def rings(count: int) -> int | None:
        calls.append(1)
        if len(calls) == 10:
            engine.abort()
        return reserve(count)

    activations.reserve = rings
    requests = unequal_groups()
    drawn = Drawn.of(requests, engine.generate(requests, Sampling(max_tokens=40)))
    assert {row.finish for row in drawn.completions} == {"abort"}
    assert sorted(drawn.counts) == [0] * 6 + [11] * 4
    assert activations.num_tokens == 40
    assert len(drawn.known(activations, model).rest) == 28
    assert gap(outcome(model, drawn, activations), outcome(model, drawn, None)) < 2e-5


def test_an_update_forgets_them():
    model, activations = build("llama"), Activations(ROOM)
    before = draw(model, activations)
    assert activations.num_tokens == 0, "nothing is kept until they are opened"
    assert before.known(activations, model) is None
    activations.open()
    drawn, trained = draw(model, activations), policy(model, activations)
    given = (drawn.prompts, drawn.tokens, torch.tensor(drawn.counts))
    known = drawn.known(activations, model)
    assert len(known.rest) == 28
    trained.backward(trained.logp(*given).logp.sum())
    scored = trained.logp(*given).logp.sum()
    trained.step()
    assert drawn.known(activations, model) is None
    with pytest.raises(RuntimeError, match="forgotten between"):
        trained.backward(scored)
    draw(model, activations)  # an evaluation, say
    assert activations.num_tokens == 0


def test_the_reference_does_not_take_them():
    """It may have other weights."""
    model, activations = build("llama"), opened()
    trained = Policy(
        model,
        optim=Optim(lr=0.1, warmup_steps=0),
        total_updates=3,
        products="native",
        reference="copy",
        activations=activations,
    )
    drawn = draw(model, activations)
    given = (drawn.prompts, drawn.tokens, torch.tensor(drawn.counts))
    before = trained.ref_logp(*given).logp
    trained.backward(trained.logp(*given).logp.sum())
    trained.step()
    activations.open()
    draw(model, activations)  # other weights: what the same tokens give now
    assert torch.equal(trained.ref_logp(*given).logp, before)


def test_a_reference_by_the_adapter_turned_off_does_not_take_them():
    model, activations = adapted(4), opened()
    trained = Policy(
        model,
        optim=Optim(),
        total_updates=3,
        products="native",
        reference="adapter",
        activations=activations,
    )
    drawn = draw(model, activations)
    given = (drawn.prompts, drawn.tokens, torch.tensor(drawn.counts))
    with_them, logp = trained.ref_logp(*given).logp, trained.old_logp(*given).logp
    activations.clear()
    assert torch.equal(with_them, trained.ref_logp(*given).logp)
    assert (with_them - logp).abs().max() > 0.1


def test_where_they_cannot_be_kept():
    """Where torch multiplies, waves are drawn, or a width is odd."""
    model = build("llama")

    def can(model: nn.Module, **settings) -> bool:
        options = {"products": "native"} | settings
        activations = opened()
        engine = LocalEngine(model, letters, pad_token=0, activations=activations, **options)
        engine.generate(unequal_groups(), Sampling(max_tokens=40))
        assert engine.can_keep == (activations.num_tokens > 0)
        return engine.can_keep

    assert can(model)
    assert not can(model, products="torch")
    assert not can(model, kind="plain")
    assert not can(build("llama", intermediate_size=47))


def test_memory_that_there_is_not():
    with pytest.raises(ValueError, match=r"engine.max_kept_gib = 1.07374e\+09: .*lower it"):
        draw(build("llama"), opened(2**60))


def metrics_of(model: Path, folder: Path, kept: float, capsys) -> dict[str, list[float]]:
    """Of two steps by ``gruppo train``, in which groups are drawn until two are live."""
    changes = {
        "train.steps": "2",
        "rollout.max_tokens": "40",
        "rollout.filter": "resample",
        "model.compute": "float32",
        "model.products": "native",
        "engine.max_kept_gib": str(kept),
        "record.folder": str(folder),
    }
    assert main(["train", "quickstart", *arguments(model, f"kept{kept}", **changes)]) == 0
    assert "keeps nothing" not in capsys.readouterr().out
    with Database(folder / f"kept{kept}" / "run.sqlite", read_only=True) as database:
        found = database.metrics()
    return {name: [value for _, value in series] for name, series in found.items()}


def test_a_run_learns_the_same(tiny_folder, tmp_path, capsys, monkeypatch):
    known, find = [], Activations.find

    def watch(self, *args, **more):
        known.append(find(self, *args, **more))
        return known[-1]

    monkeypatch.setattr(Activations, "find", watch)
    mine = metrics_of(tiny_folder, tmp_path, 0.01, capsys)
    assert [one is not None for one in known[-2:]] == [True, True]
    known.clear()
    plain = metrics_of(tiny_folder, tmp_path, 0.0, capsys)
    assert not any(known)
    timed = {name for name in mine if name.startswith(("time/", "mem"))}
    assert len(mine.keys() - timed) > 30
    for name in mine.keys() - timed:
        assert mine[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5, nan_ok=True), name


def test_a_run_that_can_keep_none_says_so(tiny_folder, tmp_path, capsys):
    changes = {
        "train.steps": "1",
        "model.products": "torch",
        "engine.max_kept_gib": "1",
        "record.folder": str(tmp_path),
    }
    assert main(["train", "quickstart", *arguments(tiny_folder, "none", **changes)]) == 0
    told = "engine: max_kept_gib = 1 keeps nothing: it needs a model of Llama's kind on a CPU"
    assert told in capsys.readouterr().out
