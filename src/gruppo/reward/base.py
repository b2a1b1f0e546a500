"""The reward boundary: from whatever reward functions return to one clean ``Score`` per row.

Everything that can go wrong inside a reward ends here: exceptions, wrong lengths and values that
are no usable numbers become a counted ``Failure`` and an unscored value, never a silent 0, and the
other rows keep theirs. This module knows no particular reward, starts no process and sets no
deadline; rewards that need those bring their own (see ``gruppo.worker``). How one part counts
stands in ``part.py``, what is checked of its values in ``cells.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

from gruppo.reward.cells import Cell, grader, guarded, refused, run_part, run_shape, ungraded
from gruppo.reward.part import (
    BatchReward,
    Closes,
    GroupRows,
    Locates,
    Part,
    Shaping,
    Value,
)
from gruppo.types import Completion, Failure, Problem, Score, is_task_live

__all__ = [
    "BatchReward",
    "GroupRows",
    "Part",
    "RewardSet",
    "Shaping",
    "Value",
    "guarded",
    "refused",
    "ungraded",
]


@dataclass(frozen=True, slots=True)
class RewardSet:
    """All parts of the reward, summed to one total per completion.

    ``total = sum of weight * value over the parts that gave a value``, then the shaping terms,
    then an optional clip to ``clip_range``. What a part's value counts as, its range and gate
    decide, and its ramp what its weight is (``Part``); ``at`` gives the set as it is at a step.
    A part that returns None abstains. A row is unscored
    (``total = None``) when no task part gave a value, and when the grader of a term with a weight
    *failed*: without it the total is on another scale than the rest of its group, and would look
    better or worse than they for no doing of the policy. Its ``task`` stays, if it was graded. A
    grader that failed behind a closed gate is not missed; one that decides a gate is.

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
        ValueError: no parts, two parts of one name, an unknown or shaping task, an empty range, a
            gate on a part that is not there or only shapes.
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
        for part in self.parts:
            if part.gate is not None and part.gate.part not in self.part_names:
                raise ValueError(
                    f"reward part {part.name!r}: gate.part = {part.gate.part!r} is not the name of "
                    f"a reward part that is no shaping term; there are: "
                    f"{', '.join(self.part_names)}"
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

    def at(self, step: int) -> RewardSet:
        """The set with the weights of a training step (1 is the first), and no ramps."""
        if all(part.ramp is None for part in self.parts):
            return self
        parts = (replace(part, weight=part.weight_at(step), ramp=None) for part in self.parts)
        return replace(self, parts=tuple(parts))

    def score(self, problem: Problem, completions: Sequence[Completion]) -> tuple[Score, ...]:
        """Score one group: one ``Score`` per completion, in order. Never raises."""
        return self.score_groups([(problem, completions)])[0]

    def score_groups(self, groups: Sequence[GroupRows]) -> list[tuple[Score, ...]]:
        """Score many groups; batch rewards see all their rows in one call. Never raises."""
        plain = [part for part in self.parts if not part.shape]
        columns = {part.name: run_part(part, groups) for part in plain}
        cells = [
            [{name: column[g][i] for name, column in columns.items()} for i in range(len(rows))]
            for g, (_, rows) in enumerate(groups)
        ]
        scored = [tuple(self._combine(row) for row in group) for group in cells]
        for part in self.parts:
            if part.shape:
                terms = run_shape(part, groups, scored)
                scored = [
                    self._add(part, before, [_Row(*pair) for pair in zip(term, group, strict=True)])
                    for before, term, group in zip(scored, terms, cells, strict=True)
                ]
        return [tuple(self._clip(score) for score in row) for row in scored]

    def close(self) -> None:
        """End the worker processes that parts hold; they start again when they are needed."""
        for part in self.parts:
            if isinstance(part.reward, Closes):
                part.reward.close()

    def _combine(self, cells: dict[str, Cell]) -> Score:
        """Sum one row's cells; unscored if the task or a weighted part could not be graded."""
        tasks = [cells[name] for name in self.task_names]
        task = next((cell.task for cell in tasks if cell.task is not None), None)
        if any(cell.failed for cell in tasks):
            task = None
        terms = [_Term(part, cells[part.name], cells) for part in self.parts if not part.shape]
        lost = [cell for term in terms if term.part.weight != 0 for cell in term.missing]
        failed = [cell for cell in tasks if cell.failed] + lost
        error = _first_error([*failed, *tasks, *cells.values()])
        total = None
        if task is not None and not lost:
            values = [(term.part.weight, term.value) for term in terms]
            total = math.fsum(weight * value for weight, value in values if value is not None)
        elif not failed:
            error = grader("none", "the task reward gave no value (None)")
        return Score(
            total=total,
            task=task,
            parts={name: cell.value for name, cell in cells.items()},
            counted={term.part.name: term.value for term in terms if term.changed},
            steps=next((cell.steps for cell in tasks if cell.steps), ()),
            error=error,
        )

    def _add(
        self, part: Part, before: tuple[Score, ...], rows: Sequence[_Row]
    ) -> tuple[Score, ...]:
        """Record a shaping term, and add it where it counts."""
        live = is_task_live(before) or not self.shape_only_live
        counts = live and part.weight != 0
        return tuple(
            self._added(_Term(part, row.cell, row.others), score, counts=counts)
            for score, row in zip(before, rows, strict=True)
        )

    def _added(self, term: _Term, score: Score, *, counts: bool) -> Score:
        """One row's score with a shaping term."""
        name, cell, lost = term.part.name, term.cell, term.missing
        error, total = score.error or cell.error, score.total
        if counts and lost and total is not None:
            # what made the row unscored is told before what only befell it
            error, total = lost[0].error, None
        elif counts and total is not None and term.value is not None:
            total += term.part.weight * term.value
        return replace(
            score,
            parts={**score.parts, name: cell.value},
            counted={**score.counted, name: term.value} if term.changed else score.counted,
            error=error,
            total=total,
        )

    def _clip(self, score: Score) -> Score:
        if score.total is None or self.clip_range is None:
            return score
        low, high = self.clip_range
        return replace(score, total=min(max(score.total, low), high))


@dataclass(frozen=True, slots=True)
class _Row:
    """A row's cell of a shaping term, and its cells of the parts that gates may read."""

    cell: Cell
    others: dict[str, Cell]


@dataclass(frozen=True, slots=True)
class _Term:
    """One part's cell on one row, with the row's other cells, of which one may be its gate."""

    part: Part
    cell: Cell
    others: dict[str, Cell]

    @property
    def value(self) -> float | None:
        """What counts, before the weight."""
        gate = self.part.gate
        return self.part.counted(self.cell.value, self.others[gate.part].value if gate else None)

    @property
    def changed(self) -> bool:
        """Whether that is not the raw value."""
        return self.value != self.cell.value

    @property
    def missing(self) -> list[Cell]:
        """The failed cells without which the term is not known."""
        gate = self.part.gate
        key = self.others[gate.part] if gate else None
        if key is not None and key.failed:
            return [key]
        shut = gate is not None and key is not None and not gate.is_open(key.value)
        return [self.cell] if self.cell.failed and not shut else []


def _first_error(cells: Iterable[Cell]) -> Failure | None:
    return next((cell.error for cell in cells if cell.error is not None), None)
