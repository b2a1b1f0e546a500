"""``gruppo resume RUN --replay STEP``: run a step again from the checkpoint before it.

Nothing is recorded. Automatic differentiation checks every gradient, so that one that is not
finite is told with the operation that made it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gruppo.errors import NumericError, ServiceError
from gruppo.evaluate import Evaluation
from gruppo.policy import checkpoint
from gruppo.recipe import Recipe
from gruppo.recipe.build import Report, resolve
from gruppo.recipe.session import read_recipe, restore
from gruppo.record import RunDirectory
from gruppo.train import Outcome, Run, TrainState, train
from gruppo.types import Callback, Group
from gruppo.update import Targets


@dataclass(frozen=True, slots=True)
class Forgetful:
    """A keeper that keeps nothing."""

    def step(
        self, step: int, groups: Sequence[Group], advantage: Tensor, metrics: Mapping[str, float]
    ) -> None:
        """Keep nothing."""

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Keep nothing."""

    def due(self, step: int) -> bool:
        """No checkpoint is due."""
        return False

    def save(self, state: TrainState) -> None:
        """Keep nothing."""

    def dump(self, state: TrainState, targets: Targets) -> str:
        """Keep nothing; the step is being replayed already."""
        return "(this replay)"


def replay(path: Path, step: int, report: Report) -> int:
    """Run from the last checkpoint before ``step`` (or the start) to ``step``, and show it.

    Raises:
        ValueError: it is no run, or has no such step, or its data or model are not there any more.
        ServiceError: the loop ended before the step.
        NumericError: a gradient was not finite; the text names the operation.
    """
    with RunDirectory.open(path, lock=False) as directory:
        recipe = read_recipe(directory)
        if not 1 <= step <= recipe.train.steps:
            raise ValueError(f"--replay {step}: {path} has steps 1 to {recipe.train.steps}")
        known = [number for number in checkpoint.steps(directory.checkpoints) if number < step]
        folder = directory.checkpoints / f"{known[-1]:08d}" if known else None
    show = _Show(step, report)
    with replaying(recipe, folder, report, until=step, callback=show) as (run, state):
        outcome = _train_checked(run, state)
    if outcome.state.step < step:
        last, why = outcome.state.step, outcome.ended_by
        raise ServiceError(f"replay: step {step} was not reached: it ended after {last} ({why})")
    return 0


@contextmanager
def replaying(
    recipe: Recipe, folder: Path | None, report: Report, *, until: int, callback: Callback
) -> Iterator[tuple[Run, TrainState | None]]:
    """A run that records nothing, from the checkpoint ``folder`` (None: the start) to ``until``.

    Raises:
        OSError: the checkpoint is damaged or cannot be read.
    """
    if folder is not None:
        checkpoint.verify(folder)
    torch.manual_seed(recipe.train.seed)
    parts = resolve(recipe, report)
    try:
        state = None
        if folder is not None:
            checkpoint.verify(folder)
            state = restore(parts, folder)
        run = Run(
            policy=parts.policy,
            engine=parts.opened.engine,
            rollouts=parts.rollouts,
            objective=parts.objective,
            settings=replace(recipe.train, steps=until, time_limit_s=0),
            keeper=Forgetful(),
            callbacks=(callback,),
        )
        yield run, state
    finally:
        parts.close()


def _train_checked(run: Run, state: TrainState | None) -> Outcome:
    try:
        with torch.autograd.set_detect_anomaly(True):
            return train(run, state)
    except RuntimeError as error:
        if "returned nan values" not in str(error):
            raise
        raise NumericError(f"replay: {error}") from error


@dataclass(frozen=True, slots=True)
class _Show:
    """Reports every metric of one step."""

    step: int
    report: Report

    def __call__(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Report the step if it is the one asked for."""
        if step == self.step:
            lines = [f"  {name:<32}{value:>14.6g}" for name, value in sorted(metrics.items())]
            self.report("\n".join([f"step {step}", *lines]))
