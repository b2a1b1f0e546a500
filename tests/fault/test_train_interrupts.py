"""A signal anywhere in a step: the run goes on from what was saved as if nothing had been."""

import dataclasses
import os
import signal

import pytest
import torch

from gruppo.evaluate import EVAL_KEY
from gruppo.interrupt import Interrupted
from gruppo.policy import Policy
from gruppo.train import train
from support.runs import (
    WITH_KL,
    run_of,
    scripted,
)


class Bell:
    """Sends this process a signal at the ``at``-th ring."""

    def __init__(self, at):
        self.left = at

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def before(method, bell):
    def rings(policy, *rest):
        bell()
        return method(policy, *rest)

    return rings


def hang(run, monkeypatch, place):
    """Hang the bell where it rings in the third step; returns the step that is kept."""
    if place == "evaluation":
        bell = Bell(2)  # greedy, after step 2
        run.engine.hook = lambda key: bell() if key == EVAL_KEY else None
        return 2
    if place == "sampling":
        bell = Bell(3)
        run.engine.hook = lambda key: bell() if key == 0 else None
    elif place == "backward":  # 2 in the self-test's two passes (1 + 4), then one a minibatch
        monkeypatch.setattr(Policy, "backward", before(Policy.backward, Bell(5 + 4 + 1)))
    elif place == "step":
        monkeypatch.setattr(Policy, "step", before(Policy.step, Bell(5)))
        return 3  # weights have moved: the step is finished first
    elif place == "import":  # in sampling, where something is imported for the first time
        bell = Bell(3)
        run.engine.hook = lambda key: importing(bell) if key == 0 else None
    else:
        run.keeper.on_save = Bell(1)
        return 2
    return 2


def importing(bell):
    """Ring while a class body's field gets its name; Python 3.11 wraps what is raised there."""
    name = type("Name", (), {"__set_name__": lambda self, *_: bell()})()
    type("Imported", (), {"field": name})


@pytest.mark.parametrize(
    "place",
    [
        "backward",
        "save",
        *(
            pytest.param(p, marks=pytest.mark.slow)
            for p in ("sampling", "import", "step", "evaluation")
        ),
    ],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tiny_folder, monkeypatch, place):
    how = {
        "objective": WITH_KL,
        "due": (2,),
        "minibatches": 2,
        "reference_sync_steps": 2,
    }
    unbroken = run_of(tiny_folder, evaluator=scripted([1, 0, 2], every=2), **how)
    ended = train(unbroken).state
    run = run_of(tiny_folder, evaluator=scripted([1, 0, 2], every=2), **how)
    with monkeypatch.context() as patch:
        step = hang(run, patch, place)
        with pytest.raises(Interrupted, match="SIGTERM"):
            train(run)
    assert max(run.keeper.saved) == step
    state, tensors, scalars = run.keeper.saved[step]
    assert state.step == step
    to_come = [solved for at, solved in ((2, 0), (4, 2)) if at > state.evaluated]
    again = run_of(tiny_folder, evaluator=scripted(to_come, every=2), **how)
    again.policy.restore(tensors, scalars)
    again.rollouts.restore(state.rollouts)
    again.engine.load(None, again.policy.version)
    torch.set_rng_state(state.rng)
    final = train(again, state).state
    assert torch.equal(final.rng, ended.rng)
    for entry in dataclasses.fields(ended):
        if entry.name != "rng":
            assert getattr(final, entry.name) == getattr(ended, entry.name), entry.name
    for number in range(step + 1, 5):
        ours, theirs = again.keeper.metrics[number], unbroken.keeper.metrics[number]
        same = {name for name in theirs if str(ours.get(name)) == str(theirs[name])}
        assert {name for name in theirs.keys() - same if not name.startswith("time/")} == set()
    expected = unbroken.keeper.weights[4]
    assert {
        n for n, t in again.keeper.weights[4].items() if not torch.equal(t, expected[n])
    } == set()
