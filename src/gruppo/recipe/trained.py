"""A trained model out of a run directory: to evaluate it, talk to it or export it.

The run may be going on: nothing is locked and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gruppo.policy import Policy, checkpoint
from gruppo.recipe.build import Opened, Report, open_model
from gruppo.recipe.keeper import read_checkpoint
from gruppo.recipe.recipe import Recipe
from gruppo.recipe.session import read_recipe
from gruppo.record import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A run's model as of ``step`` (0: before training)."""

    recipe: Recipe
    opened: Opened
    policy: Policy
    step: int


def is_run(path: Path) -> bool:
    """Whether ``path`` looks like a run directory."""
    return (path / "recipe.toml").is_file() and (path / "run.json").is_file()


def open_trained(
    path: Path, report: Report, *, step: int | None = None, settings: Iterable[str] = ()
) -> Trained:
    """Open the model of the run in ``path``, as of its newest intact checkpoint or of ``step``.

    ``settings`` change its recipe: the device to compute on, say.

    Raises:
        ValueError: it is no run, or has no checkpoint (of that step).
        OSError: the checkpoint is damaged or cannot be read.
    """
    with RunDirectory.open(path, lock=False) as directory:
        recipe = read_recipe(directory, settings)
        folder = _checkpoint(directory, step)
    opened = open_model(recipe.model, recipe, report)
    policy = Policy(
        opened.model,
        optim=recipe.optim,
        total_updates=recipe.train.num_updates,
        compute_dtype=opened.compute,
        temperature=recipe.rollout.temperature,
    )
    state = read_checkpoint(folder, policy, reference=False)
    report(f"weights: {path} after step {state.step}")
    return Trained(recipe=recipe, opened=opened, policy=policy, step=state.step)


def _checkpoint(directory: RunDirectory, step: int | None) -> Path:
    if step is None:
        found, damaged = checkpoint.latest(directory.checkpoints)
        if found is None:
            reason = f"; {damaged[0]}" if damaged else ""
            raise ValueError(f"{directory.path} has no usable checkpoint yet{reason}")
        return found
    known = checkpoint.steps(directory.checkpoints)
    if step not in known:
        raise ValueError(f"step = {step}: {directory.path} has checkpoints of steps {known}")
    folder = directory.checkpoints / f"{step:08d}"
    checkpoint.verify(folder)
    return folder
