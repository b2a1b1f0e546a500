"""One term of the reward: what grades, and how its raw value comes to count in the total.

The protocols of what can grade stand here, and the small records that a ``Part`` is made of: its
range, its gate, the course of its weight. Nothing is called and nothing is summed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from gruppo.types import Completion, Problem, Score

GroupRows = tuple[Problem, Sequence[Completion]]
Value = float | None | Score
# What gruppo.types.Reward describes, in a form that a union can be checked against at run time.
GroupReward = Callable[[Problem, Sequence[Completion]], Sequence[Value]]

# Group statistics square rewards; beyond this a reward is a bug, and float32 would lose the rest.
MAX_MAGNITUDE = 1e9


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
class Opens(Protocol):
    """A reward that can find before training what would fail in it (a name, a model, a key)."""

    def open(self) -> object:
        """Get ready. Raises ValueError or OSError with what is to be mended."""
        ...


@runtime_checkable
class Closes(Protocol):
    """A reward that holds something: worker processes, a model."""

    def close(self) -> None:
        """Let go of it; the reward can be used again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A part counts only in rows where another part's raw value is at least ``at``.

    Elsewhere its value counts as ``otherwise``; None is the gated part's ``minimum``. Where the
    other part abstained, the gate is open. "Format must hold before correctness counts" is
    ``Gate(part="format")`` on the accuracy part.

    Raises:
        ValueError: no name, or a number that is not finite.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    part: str
    at: float = 1.0
    otherwise: float | None = None

    def __post_init__(self) -> None:
        if not self.part:
            raise ValueError("gate.part is empty: name the part whose value opens the gate")
        for name, value in (("at", self.at), ("otherwise", self.otherwise)):
            if value is not None and not abs(value) <= MAX_MAGNITUDE:
                raise ValueError(
                    f"gate.{name} = {value}: it must be a number up to {MAX_MAGNITUDE:g}"
                )

    def is_open(self, value: float | None) -> bool:
        """Whether the gate is open at the other part's ``value`` (None: it abstained)."""
        return value is None or value >= self.at


@dataclass(frozen=True, slots=True, kw_only=True)
class Ramp:
    """A weight that moves in a straight line to ``to``, from ``from_step`` to ``to_step``.

    Up to ``from_step`` it is the part's own weight, from ``to_step`` on it is ``to``. The first
    step of a run is 1. It depends on the step's number alone, so a resumed run has the same.

    Example:
        >>> ramp = Ramp(to=0.0, from_step=10, to_step=20)
        >>> [ramp.at(step, start=1.0) for step in (1, 10, 15, 20, 99)]
        [1.0, 1.0, 0.5, 0.0, 0.0]

    Raises:
        ValueError: a weight that is not finite, or steps that are not in order.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["linear"] = "linear"
    to: float
    from_step: int = 1
    to_step: int

    def __post_init__(self) -> None:
        if not abs(self.to) <= MAX_MAGNITUDE:
            raise ValueError(f"ramp.to = {self.to}: it must be a number up to {MAX_MAGNITUDE:g}")
        if not 0 <= self.from_step < self.to_step:
            raise ValueError(
                f"ramp.from_step = {self.from_step}, to_step = {self.to_step}: the first must be "
                "0 or more, and below the second"
            )

    def at(self, step: int, *, start: float) -> float:
        """The weight at ``step`` of a part whose own weight is ``start``."""
        done = (step - self.from_step) / (self.to_step - self.from_step)
        return start + (self.to - start) * min(max(done, 0.0), 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One named term of the reward.

    ``weight`` multiplies the value in the total. ``minimum`` is the raw value of a completion
    that made its own grading fail (``Failure.fault == "completion"``): it must be no better than
    the worst wrong answer. ``shape = True`` marks a term that is added after the task metric is
    taken (length, overlong, repetition), see ``RewardSet.shape_only_live``.

    What counts in the total is the raw value, cut to ``clip`` (low, high), then judged by ``gate``,
    times the weight, which ``ramp`` moves over the steps. The task metric and ``Score.parts`` are
    raw; ``Score.counted`` holds the values that clip and gate changed.

    Raises:
        ValueError: empty name, non-finite weight or minimum, an empty range, a gate on itself, or
            a ``Shaping`` without ``shape``.
    """

    name: str
    reward: GroupReward | BatchReward | Shaping
    weight: float = 1.0
    minimum: float = 0.0
    shape: bool = False
    clip: tuple[float, float] | None = None
    gate: Gate | None = None
    ramp: Ramp | None = None

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
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(
                f"reward part {self.name!r}: clip = {self.clip}: the first number must be the "
                "smaller one"
            )
        if self.gate is not None and self.gate.part == self.name:
            raise ValueError(
                f"reward part {self.name!r}: gate.part names the part itself; name another one"
            )

    def weight_at(self, step: int) -> float:
        """The weight at a training step (1 is the first)."""
        return self.weight if self.ramp is None else self.ramp.at(step, start=self.weight)

    def counted(self, value: float | None, gate_value: float | None) -> float | None:
        """What a raw ``value`` counts as, where the gate's part has the raw ``gate_value``.

        >>> part = Part(name="a", reward=lambda p, c: [], clip=(-1.0, 1.0), gate=Gate(part="b"))
        >>> part.counted(7.0, 1.0), part.counted(7.0, 0.0), part.counted(None, 1.0)
        (1.0, 0.0, None)
        """
        if self.gate is not None and not self.gate.is_open(gate_value):
            return self.minimum if self.gate.otherwise is None else self.gate.otherwise
        if value is None or self.clip is None:
            return value
        return min(max(value, self.clip[0]), self.clip[1])
