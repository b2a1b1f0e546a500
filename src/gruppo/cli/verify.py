"""``gruppo resume RUN --verify K``: run the last K steps again and compare, bit by bit.

They start from a checkpoint before them and end at the newest one. Every metric but times is
compared with the recorded one, and in the end every tensor with the checkpoint's: weights,
optimizer moments, a moved reference. Nothing is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from gruppo.cli.replay import replaying
from gruppo.errors import ServiceError
from gruppo.policy import Policy, checkpoint
from gruppo.recipe.build import Report
from gruppo.recipe.keeper import RNG, checkpoint_tensors
from gruppo.recipe.session import read_recipe
from gruppo.record import Database, RunDirectory
from gruppo.train import train
from gruppo.types import Group

FOUND: Final = 1  # exit code of a finding
_NOT_COMPARED: Final = "time/"

Series = Mapping[str, Sequence[tuple[int, float]]]


def verify(path: Path, count: int, report: Report) -> int:
    """Run the last ``count`` steps before the newest checkpoint again; 0 if they are the same.

    Returns 1 if they differ, and says where first.

    Raises:
        ValueError: it is no run, or has no such steps before a checkpoint.
        OSError: a checkpoint is damaged or cannot be read.
        ServiceError: the steps ended early.
    """
    with (
        RunDirectory.open(path, lock=False) as directory,
        Database(directory.database, read_only=True) as database,
    ):
        recipe, recorded = read_recipe(directory), database.metrics()
        saved = checkpoint.steps(directory.checkpoints)
        last = saved[-1] if saved else 0
        if not 1 <= count <= last:
            raise ValueError(
                f"--verify {count}: {path} has {last} steps up to its newest checkpoint"
                + (f"; give 1 to {last}" if last else "")
            )
        known = [step for step in saved if step <= last - count]
        folders = [directory.checkpoints / f"{step:08d}" for step in (*known[-1:], last)]
    checkpoint.verify(folders[-1])
    begin = folders[0] if known else None
    compare = _Compare(recorded)
    with replaying(recipe, begin, report, until=last, callback=compare) as (run, state):
        report(f"verifying steps {state.step + 1 if state else 1} to {last} of {path}")
        outcome = train(run, state)
        if outcome.state.step < last:
            raise ServiceError(
                f"verify: step {last} was not reached: it ended after {outcome.state.step} "
                f"({outcome.ended_by})"
            )
        differing = differing_tensors(run.policy, folders[-1])
    for text in compare.found[:1]:
        report(text)
    if differing:
        report(
            f"tensors: {len(differing)} differ from checkpoint {last}, the first is {differing[0]}"
        )
    if compare.found or differing:
        return FOUND
    report(
        f"equal to the last bit: {compare.compared:,} metrics, and all tensors after step {last}"
    )
    return 0


def differing_tensors(policy: Policy, folder: Path) -> list[str]:
    """Names of the policy's tensors that are not those of the checkpoint, in the model's order."""
    live = policy.state()[0]
    stored = checkpoint_tensors(folder, live)
    names = [name for name in live if not _equal(live[name], stored.get(name))]
    return names + [name for name in stored if name not in live and name != RNG]


def _equal(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and torch.equal(one.detach().cpu(), other.cpu())


def _same(one: float | None, other: float | None) -> bool:
    """Whether two recorded numbers are the same: NaN is itself, and SQLite has one zero."""
    both_nan = one is not None and other is not None and math.isnan(one) and math.isnan(other)
    return both_nan or one == other


@dataclass(slots=True)
class _Compare:
    """Compares every step's metrics with the recorded ones."""

    recorded: Series
    found: list[str] = field(default_factory=list)
    compared: int = 0

    def __call__(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Note what differs in this step."""
        then = {
            name: value
            for name, points in self.recorded.items()
            for at, value in points
            if at == step
        }
        for name in sorted({*then, *metrics}):
            if name.startswith(_NOT_COMPARED):
                continue
            self.compared += 1
            old, new = then.get(name), metrics.get(name)
            if not _same(old, new):
                self.found.append(f"step {step}: {name} was {old!r} and is {new!r}")
