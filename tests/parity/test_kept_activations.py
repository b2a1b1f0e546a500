"""When activations are kept, taken and forgotten: only what the same weights computed is taken."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gruppo import native
from gruppo.cli import main
from gruppo.engine import LocalEngine
from gruppo.model import Activations
from gruppo.policy import Optim, Policy
from gruppo.record import Database
from gruppo.types import Sampling
from support.commands import arguments
from support.engines import letters, unequal_groups
from support.kept import PROMPTS, ROOM, Drawn, draw, opened, outcome
from support.passes import adapted, build, gap, needs_kernels

pytestmark = needs_kernels


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
    elif how == "adapter off":
        model.disable_adapter_layers()
    else:
        for module in model.modules():
            for name in vars(module).get("scaling", ()) if hasattr(module, "lora_A") else ():
                module.scaling[name] *= 3


@pytest.mark.parametrize(
    ("how", "forgets"),
    [
        ("optimizer", True),
        ("restored", True),
        ("loaded", False),
        ("given to the engine", False),
        ("adapter off", False),
        ("adapter scaled", False),
    ],
)
def test_what_other_weights_computed_is_not_taken(how, forgets):
    """Forgotten by who changes them, or known by the weights."""
    model, activations = adapted(rank=4) if how.startswith("adapter") else build("llama"), opened()
    drawn = draw(model, activations)
    assert drawn.known(activations, model) is not None
    assert drawn.known(activations, build("llama")) is None, "of another module"
    change(how, model, activations)
    assert (activations.num_tokens == 0) == forgets
    assert drawn.known(activations, model) is None


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
    assert len(drawn.known(activations, model).rest) == PROMPTS


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
    assert len(drawn.known(activations, model).rest) == PROMPTS
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
    assert len(known.rest) == PROMPTS
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
    model, activations = adapted(rank=4), opened()
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
