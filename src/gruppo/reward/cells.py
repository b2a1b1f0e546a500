"""What grading returned, checked: one ``Cell`` per part and row.

Exceptions, wrong lengths and values that are no usable numbers become a ``Failure`` of the rows
they concern, never a silent 0, and the other rows keep theirs. Nothing is summed here.
"""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from gruppo.reward.part import MAX_MAGNITUDE, BatchReward, GroupRows, Part, Shaping
from gruppo.types import Failure, Score

T = TypeVar("T")

_TEXT_LIMIT = 500


def ungraded(kind: str, text: str) -> Score:
    """What a reward returns for a row that it failed to grade: unscored, and counted."""
    return Score(total=None, task=None, error=grader(kind, text))


def refused(kind: str, text: str) -> Score:
    """What a reward returns for a completion that made its grading fail: the part's minimum."""
    return Score(total=None, task=None, error=Failure(kind=kind, fault="completion", text=text))


def guarded(name: str, call: Callable[[], T]) -> T | Failure:
    """Run ``call``; whatever it raises (``sys.exit`` too, but not Ctrl-C) becomes a Failure."""
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a reward that calls sys.exit must not end the training
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        kind = "exit" if isinstance(error, SystemExit) else "exception"
        return grader(kind, f"{name}: {type(error).__name__}: {error}{where}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One part's verdict on one row, after checking: ``value`` None is "no value"."""

    value: float | None
    task: float | None
    steps: tuple[tuple[int, float], ...] = ()
    error: Failure | None = None

    @property
    def failed(self) -> bool:
        """Whether the grader failed (no value without an error is a choice)."""
        return self.value is None and self.error is not None


def grader(kind: str, text: str) -> Failure:
    """A failure of the grader."""
    return Failure(kind=kind, fault="grader", text=text[:_TEXT_LIMIT])


def _failed(failure: Failure, num_rows: int) -> list[Cell]:
    return [Cell(value=None, task=None, error=failure)] * num_rows


def run_part(part: Part, groups: Sequence[GroupRows]) -> list[list[Cell]]:
    """Call one part on all groups and check what comes back."""
    reward = part.reward
    sizes = [len(completions) for _, completions in groups]
    if isinstance(reward, BatchReward):
        raw = guarded(part.name, lambda: list(reward.score_batch(groups)))
        if not isinstance(raw, Failure) and len(raw) != len(groups):
            text = f"{part.name}: {len(raw)} results for {len(groups)} groups"
            raw = grader("length", text)
        if isinstance(raw, Failure):
            return [_failed(raw, size) for size in sizes]
        return [_check(part, rows, size) for rows, size in zip(raw, sizes, strict=True)]
    assert not isinstance(reward, Shaping), "Part refuses a Shaping that is not marked as one"
    return [
        _check(part, guarded(part.name, partial(reward, problem, completions)), len(completions))
        for problem, completions in groups
    ]


def run_shape(
    part: Part, groups: Sequence[GroupRows], scores: Sequence[tuple[Score, ...]]
) -> list[list[Cell]]:
    """Call one shaping term on all groups."""
    reward = part.reward
    if not isinstance(reward, Shaping):
        return run_part(part, groups)
    return [
        _check(part, guarded(part.name, partial(reward.shape, problem, rows, before)), len(rows))
        for (problem, rows), before in zip(groups, scores, strict=True)
    ]


def _check(part: Part, rows: object, num_rows: int) -> list[Cell]:
    """Check a group's returned values; a bad one is unscored and the others are kept."""
    if isinstance(rows, Failure):
        return _failed(rows, num_rows)
    if isinstance(rows, str | bytes | dict) or not isinstance(rows, Iterable):
        text = f"{part.name} returned {type(rows).__name__}, not one value per completion"
        return _failed(grader("type", text), num_rows)
    listed = guarded(part.name, partial(list, rows))
    if isinstance(listed, Failure):
        return _failed(listed, num_rows)
    if len(listed) != num_rows:
        text = f"{part.name} returned {len(listed)} values for {num_rows} completions"
        return _failed(grader("length", text), num_rows)
    return [_cell(part, value) for value in listed]


def _cell(part: Part, value: object) -> Cell:
    """Check one value, or the Score that a reward returned in its place."""
    if not isinstance(value, Score):
        number, error = _number(part.name, value)
        return Cell(value=number, task=number, error=error)
    if value.error is not None and value.error.fault == "completion":
        return Cell(value=part.minimum, task=part.minimum, error=value.error)
    if value.error is not None:
        return Cell(value=None, task=None, error=value.error)
    number, error = _number(part.name, value.total)
    task, task_error = _number(part.name, number if value.task is None else value.task)
    if error is not None or task_error is not None:
        return Cell(value=None, task=None, error=error or task_error)
    return Cell(value=number, task=task, steps=value.steps)


def _number(name: str, value: object) -> tuple[float | None, Failure | None]:
    """Return ``value`` as a float, or None and what is wrong with it (None itself is no error)."""
    if value is None:
        return None, None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        text = f"{name} returned {type(value).__name__} {value!r:.80}, not a number: use float(...)"
        return None, grader("type", text)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return None, grader("nonfinite", f"{name} returned {number}")
    if abs(number) > MAX_MAGNITUDE:
        return None, grader("magnitude", f"{name} returned {number:g}, above {MAX_MAGNITUDE:g}")
    return number, None
