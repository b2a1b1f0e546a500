"""The reward boundary: from whatever reward functions return to one clean ``Score`` per row.

Everything that can go wrong inside a reward ends here: exceptions, wrong lengths and values that
are no usable numbers become a counted ``Failure`` and an unscored value, never a silent 0, and the
other rows keep theirs. This module knows no particular reward, starts no process and sets no
deadline; rewards that need those bring their own (see ``process.py``).
"""

from __future__ import annotations

import math
import numbers
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

from gruppo.types import Completion, Failure, Problem, Score, is_task_live

T = TypeVar("T")
GroupRows = tuple[Problem, Sequence[Completion]]
Value = float | None | Score
# What gruppo.types.Reward describes, in a form that a union can be checked against at run time.
GroupReward = Callable[[Problem, Sequence[Completion]], Sequence[Value]]

# Group statistics square rewards; beyond this a reward is a bug, and float32 would lose the rest.
MAX_MAGNITUDE = 1e9
_TEXT_LIMIT = 500


@runtime_checkable
class BatchReward(Protocol):
    """A reward that wants the rows of all groups in one call (a remote judge, a worker pool)."""

    def score_batch(self, groups: Sequence[GroupRows]) -> Sequence[Sequence[Value]]:
        """Score every completion of every group; one sequence per group, in order."""
        ...


@runtime_checkable
class Shaping(Protocol):
    """A reward term that depends on how the group was graded (length rewards, say)."""

    def shape(
        self, problem: Problem, completions: Sequence[Completion], scores: Sequence[Score]
    ) -> Sequence[float | None]:
        """Return the term for every completion; ``scores`` are those before any shaping."""
        ...


@runtime_checkable
class Locates(Protocol):
    """A reward that knows where in a completion the answer is read."""

    def template(self) -> str:
        """Return a completion with ``{answer}`` in place of the answer."""
        ...


@runtime_checkable
class _Closeable(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One named term of the reward.

    ``weight`` multiplies the raw value in the total. ``minimum`` is the raw value of a completion
    that made its own grading fail (``Failure.fault == "completion"``): it must be no better than
    the worst wrong answer. ``shape = True`` marks a term that is added after the task metric is
    taken (length, overlong, repetition), see ``RewardSet.shape_only_live``.

    Raises:
        ValueError: empty name, non-finite weight or minimum, or a ``Shaping`` without ``shape``.
    """

    name: str
    reward: GroupReward | BatchReward | Shaping
    weight: float = 1.0
    minimum: float = 0.0
    shape: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("Part.name is empty: give the reward part a name")
        for field, value in (("weight", self.weight), ("minimum", self.minimum)):
            if not math.isfinite(value) or abs(value) > MAX_MAGNITUDE:
                raise ValueError(
                    f"reward part {self.name!r}: {field} = {value} is not a finite number "
                    f"of magnitude up to {MAX_MAGNITUDE:g}"
                )
        if isinstance(self.reward, Shaping) and not self.shape:
            raise ValueError(
                f"reward part {self.name!r}: this reward reads the other parts' grades, "
                "so it can only be a shaping term: set shape = true"
            )


@dataclass(frozen=True, slots=True)
class RewardSet:
    """All parts of the reward, summed to one total per completion.

    ``total = sum of weight * value over the parts that gave a value``, then the shaping terms,
    then an optional clip to ``clip_range``. A part that returns None abstains. A row is unscored
    (``total = None``) when no task part gave a value, and when the grader of a term with a weight
    *failed*: without it the total is on another scale than the rest of its group, and would look
    better or worse than they for no doing of the policy. Its ``task`` stays, if it was graded.

    Args:
        parts: the terms; names must differ.
        task: the part (or parts, for mixed data: the first that gave a value counts) whose
            unshaped value is the task metric. Default: the first part that is no shaping term.
        clip_range: (low, high) for the total, or None.
        shape_only_live: add shaping terms only in groups whose task metric varies among the rows
            with a total; elsewhere they alone would decide the advantage (all-wrong rows trained
            purely on length).

    Example:
        >>> from gruppo.types import Completion, Problem
        >>> def says_four(problem, completions):
        ...     return [float(c.text == problem.answer) for c in completions]
        >>> rewards = RewardSet((Part(name="right", reward=says_four, weight=2.0),))
        >>> row = Completion(tokens=(4,), logp=(0.0,), mask=(True,), version=(0,), text="4",
        ...                  finish="stop")
        >>> [s.total for s in rewards.score(Problem(id="a", prompt=(), answer="4"), [row])]
        [2.0]

    Raises:
        ValueError: no parts, two parts of one name, an unknown or shaping task, an empty range.
    """

    parts: tuple[Part, ...]
    _: KW_ONLY
    task: str | tuple[str, ...] | None = None
    clip_range: tuple[float, float] | None = None
    shape_only_live: bool = True

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"reward parts share the name {repeated[0]!r}: names must differ")
        if not self.part_names:
            raise ValueError("the reward has no part but shaping terms: add a task reward")
        if unknown := [name for name in self.task_names if name not in self.part_names]:
            raise ValueError(
                f"reward.task = {unknown[0]!r} is not the name of a reward part that is no "
                f"shaping term; there are: {', '.join(self.part_names)}"
            )
        if self.clip_range is not None and not self.clip_range[0] < self.clip_range[1]:
            raise ValueError(
                f"reward.clip_range = {self.clip_range}: the first number must be the smaller one"
            )

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts that are summed into the total before shaping (K of them)."""
        return tuple(part.name for part in self.parts if not part.shape)

    @property
    def part_weights(self) -> tuple[float, ...]:
        """Their weights, in the same order."""
        return tuple(part.weight for part in self.parts if not part.shape)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the parts that make the task metric."""
        if self.task is None:
            return self.part_names[:1]
        return (self.task,) if isinstance(self.task, str) else self.task

    def answer_templates(self) -> dict[str, str | None]:
        """A completion with ``{answer}`` where each task part reads it; None if it cannot say."""
        tasks = {part.name: part.reward for part in self.parts if part.name in self.task_names}
        return {k: v.template() if isinstance(v, Locates) else None for k, v in tasks.items()}

    def score(self, problem: Problem, completions: Sequence[Completion]) -> tuple[Score, ...]:
        """Score one group: one ``Score`` per completion, in order. Never raises."""
        return self.score_groups([(problem, completions)])[0]

    def score_groups(self, groups: Sequence[GroupRows]) -> list[tuple[Score, ...]]:
        """Score many groups; batch rewards see all their rows in one call. Never raises."""
        plain = [part for part in self.parts if not part.shape]
        columns = {part.name: _run(part, groups) for part in plain}
        scored = [
            tuple(
                self._combine({name: column[g][i] for name, column in columns.items()})
                for i in range(len(completions))
            )
            for g, (_, completions) in enumerate(groups)
        ]
        for part in self.parts:
            if part.shape:
                terms = _run_shape(part, groups, scored)
                scored = [
                    self._add(part, before, term)
                    for before, term in zip(scored, terms, strict=True)
                ]
        return [tuple(self._clip(score) for score in row) for row in scored]

    def close(self) -> None:
        """End the worker processes that parts hold; they start again when they are needed."""
        for part in self.parts:
            if isinstance(part.reward, _Closeable):
                part.reward.close()

    def _combine(self, cells: dict[str, _Cell]) -> Score:
        """Sum one row's cells; unscored if the task or a weighted part could not be graded."""
        tasks = [cells[name] for name in self.task_names]
        task = next((cell.task for cell in tasks if cell.task is not None), None)
        if any(cell.failed for cell in tasks):
            task = None
        weights = dict(zip(self.part_names, self.part_weights, strict=True))
        lost = [cell for name, cell in cells.items() if cell.failed and weights[name] != 0]
        failed = [cell for cell in tasks if cell.failed] + lost
        error = _first_error([*failed, *tasks, *cells.values()])
        total = None
        if task is not None and not lost:
            values = [
                weights[name] * cell.value for name, cell in cells.items() if cell.value is not None
            ]
            total = math.fsum(values)
        elif not failed:
            error = _grader("none", "the task reward gave no value (None)")
        return Score(
            total=total,
            task=task,
            parts={name: cell.value for name, cell in cells.items()},
            steps=next((cell.steps for cell in tasks if cell.steps), ()),
            error=error,
        )

    def _add(
        self, part: Part, before: tuple[Score, ...], terms: Sequence[_Cell]
    ) -> tuple[Score, ...]:
        """Record a shaping term, and add it where it counts."""
        live = is_task_live(before) or not self.shape_only_live
        counts = live and part.weight != 0
        return tuple(
            replace(
                score,
                parts={**score.parts, part.name: cell.value},
                # what made the row unscored is told before what only befell it
                error=cell.error
                if counts and cell.failed and score.total is not None
                else score.error or cell.error,
                total=_plus(score.total, part.weight, cell) if counts else score.total,
            )
            for score, cell in zip(before, terms, strict=True)
        )

    def _clip(self, score: Score) -> Score:
        if score.total is None or self.clip_range is None:
            return score
        low, high = self.clip_range
        return replace(score, total=min(max(score.total, low), high))


def ungraded(kind: str, text: str) -> Score:
    """What a reward returns for a row that it failed to grade: unscored, and counted."""
    return Score(total=None, task=None, error=_grader(kind, text))


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
        return _grader(kind, f"{name}: {type(error).__name__}: {error}{where}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """One part's verdict on one row, after checking: ``value`` None is "no value"."""

    value: float | None
    task: float | None
    steps: tuple[tuple[int, float], ...] = ()
    error: Failure | None = None

    @property
    def failed(self) -> bool:
        """Whether the grader failed (no value without an error is a choice)."""
        return self.value is None and self.error is not None


def _plus(total: float | None, weight: float, cell: _Cell) -> float | None:
    """``total`` with a term added; None if either is unscored, unchanged if the term abstained."""
    if total is None or cell.failed:
        return None
    return total if cell.value is None else total + weight * cell.value


def _grader(kind: str, text: str) -> Failure:
    return Failure(kind=kind, fault="grader", text=text[:_TEXT_LIMIT])


def _first_error(cells: Iterable[_Cell]) -> Failure | None:
    return next((cell.error for cell in cells if cell.error is not None), None)


def _failed(failure: Failure, num_rows: int) -> list[_Cell]:
    return [_Cell(value=None, task=None, error=failure)] * num_rows


def _run(part: Part, groups: Sequence[GroupRows]) -> list[list[_Cell]]:
    """Call one part on all groups and check what comes back."""
    reward = part.reward
    sizes = [len(completions) for _, completions in groups]
    if isinstance(reward, BatchReward):
        raw = guarded(part.name, lambda: list(reward.score_batch(groups)))
        if not isinstance(raw, Failure) and len(raw) != len(groups):
            text = f"{part.name}: {len(raw)} results for {len(groups)} groups"
            raw = _grader("length", text)
        if isinstance(raw, Failure):
            return [_failed(raw, size) for size in sizes]
        return [_check(part, rows, size) for rows, size in zip(raw, sizes, strict=True)]
    assert not isinstance(reward, Shaping), "Part refuses a Shaping that is not marked as one"
    return [
        _check(part, guarded(part.name, partial(reward, problem, completions)), len(completions))
        for problem, completions in groups
    ]


def _run_shape(
    part: Part, groups: Sequence[GroupRows], scores: Sequence[tuple[Score, ...]]
) -> list[list[_Cell]]:
    """Call one shaping term on all groups."""
    reward = part.reward
    if not isinstance(reward, Shaping):
        return _run(part, groups)
    return [
        _check(part, guarded(part.name, partial(reward.shape, problem, rows, before)), len(rows))
        for (problem, rows), before in zip(groups, scores, strict=True)
    ]


def _check(part: Part, rows: object, num_rows: int) -> list[_Cell]:
    """Check a group's returned values; a bad one is unscored and the others are kept."""
    if isinstance(rows, Failure):
        return _failed(rows, num_rows)
    if isinstance(rows, str | bytes | dict) or not isinstance(rows, Iterable):
        text = f"{part.name} returned {type(rows).__name__}, not one value per completion"
        return _failed(_grader("type", text), num_rows)
    listed = guarded(part.name, partial(list, rows))
    if isinstance(listed, Failure):
        return _failed(listed, num_rows)
    if len(listed) != num_rows:
        text = f"{part.name} returned {len(listed)} values for {num_rows} completions"
        return _failed(_grader("length", text), num_rows)
    return [_cell(part, value) for value in listed]


def _cell(part: Part, value: object) -> _Cell:
    """Check one value, or the Score that a reward returned in its place."""
    if not isinstance(value, Score):
        number, error = _number(part.name, value)
        return _Cell(value=number, task=number, error=error)
    if value.error is not None and value.error.fault == "completion":
        return _Cell(value=part.minimum, task=part.minimum, error=value.error)
    if value.error is not None:
        return _Cell(value=None, task=None, error=value.error)
    number, error = _number(part.name, value.total)
    task, task_error = _number(part.name, number if value.task is None else value.task)
    if error is not None or task_error is not None:
        return _Cell(value=None, task=None, error=error or task_error)
    return _Cell(value=number, task=task, steps=value.steps)


def _number(name: str, value: object) -> tuple[float | None, Failure | None]:
    """Return ``value`` as a float, or None and what is wrong with it (None itself is no error)."""
    if value is None:
        return None, None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        text = f"{name} returned {type(value).__name__} {value!r:.80}, not a number: use float(...)"
        return None, _grader("type", text)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return None, _grader("nonfinite", f"{name} returned {number}")
    if abs(number) > MAX_MAGNITUDE:
        return None, _grader("magnitude", f"{name} returned {number:g}, above {MAX_MAGNITUDE:g}")
    return number, None
