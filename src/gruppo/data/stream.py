"""The order in which problems are drawn: epochs, mixtures, curriculum, and a cursor to resume.

Everything is keyed: what draw ``n`` gives depends on the seed, the data and the pass rates
recorded before it, never on how draws were batched. The state is a small JSON table. It does not
sample completions and does not decide what is a pass: rates are told to it.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, final

import torch
from jaxtyping import Int
from torch import Tensor

from gruppo.data.keyed import WORD, hash64, permutation
from gruppo.data.split import Problems
from gruppo.types import Problem

# A data set is recognised by this many of its problems: all of a small one.
_RECOGNISED_BY = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """How the pass rates of earlier draws steer later ones. The defaults steer nothing.

    The history of a problem is an exponential moving average h of its pass rates.

    Args:
        decay: weight of the old average, in [0, 1); 0 keeps the last rate only.
        floor: if set, a problem is taken with probability (h (1 - h) + floor) / (1/4 + floor),
            when its turn in the epoch comes: most often at h = 1/2, where a group's rewards differ
            most, and never with probability 0. Problems without history are always taken.
        drop_pass_rate: if set, a problem with h at or above it is not drawn any more (no-positive
            resampling, ScaleRL, arXiv:2510.13786, with 0.9).
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    decay: float = 0.5
    floor: float | None = None
    drop_pass_rate: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: {self.decay} must be at least 0 and below 1")
        # Below 0.001 a data set of solved problems would be searched for minutes at every draw.
        if self.floor is not None and not 0.001 <= self.floor <= 1000:
            raise ValueError(
                f"floor: {self.floor} must be between 0.001 and 1000; leave it out for no weights"
            )
        if self.drop_pass_rate is not None and not 0 < self.drop_pass_rate <= 1:
            raise ValueError(
                f"drop_pass_rate: {self.drop_pass_rate} must be above 0 and at most 1; leave it "
                "out to drop nothing"
            )

    def dropped(self, rate: float | None) -> bool:
        """Whether a problem with this average is out for good (None: no history)."""
        limit = self.drop_pass_rate
        return rate is not None and limit is not None and rate >= limit

    def chance(self, rate: float | None) -> float:
        """Probability that a problem with this average is taken on its turn.

        >>> Curriculum(floor=0.25).chance(0.5), Curriculum(floor=0.25).chance(1.0)
        (1.0, 0.5)
        """
        if self.dropped(rate):
            return 0.0
        if rate is None or self.floor is None:
            return 1.0
        return (rate * (1 - rate) + self.floor) / (0.25 + self.floor)


@final
class ProblemStream:
    """Draws problems from a mixture of data sets, for ever.

    Each data set is gone through in a new random order every epoch. Which data set the next draw
    comes from is chosen at random with the given weights, compared as exact fractions.

    Args:
        sources: data sets with their weights (any positive scale).
        seed: seed of all choices.
        curriculum: how recorded pass rates steer; None for not at all.
        dropped: how many problems were left out before, because their prompts are too long.

    Raises:
        ValueError: on an empty mixture or data set, a weight that is not positive, or two problems
            of one data set name with the same id, in one source or in two.

    >>> from gruppo.types import Problem
    >>> stream = ProblemStream([([Problem(id=str(i), prompt=()) for i in range(3)], 1.0)], seed=0)
    >>> sorted(problem.id for problem in stream.draw(3)), stream.epoch, stream.drawn
    (['0', '1', '2'], 1.0, 3)
    """

    __slots__ = (
        "_curriculum",
        "_cursor",
        "_drawn",
        "_dropped",
        "_history",
        "_orders",
        "_print",
        "_seed",
        "_sources",
        "_weights",
    )

    def __init__(
        self,
        sources: Sequence[tuple[Problems, float]],
        *,
        seed: int,
        curriculum: Curriculum | None = None,
        dropped: int = 0,
    ) -> None:
        _check_mixture(sources)
        self._dropped = dropped
        self._sources = tuple(problems for problems, _ in sources)
        self._weights = tuple(Fraction(weight) for _, weight in sources)
        self._seed = seed
        self._curriculum = curriculum or Curriculum()
        self._drawn = 0
        self._cursor = [[0, 0] for _ in sources]  # epoch and position in it, per data set
        self._history: dict[str, float] = {}
        self._orders: dict[int, tuple[int, Tensor]] = {}
        self._print = [_fingerprint(problems) for problems in self._sources]

    @property
    def drawn(self) -> int:
        """How many problems were drawn so far, which is also the draw index of the next one.

        The k-th problem of ``draw(n)`` has the draw index ``drawn`` (before the call) + k; it goes
        into the key of its samples, so that a problem drawn again gets other completions.
        """
        return self._drawn

    @property
    def prompts_dropped(self) -> int:
        """How many problems were left out, because their prompts are too long."""
        return self._dropped

    @property
    def epoch(self) -> float:
        """Passes so far over the data set that was gone through most often."""
        return max(self.epochs)

    @property
    def epochs(self) -> tuple[float, ...]:
        """Passes over each data set so far, with the fraction of the running one."""
        return tuple(
            epoch + position / len(problems)
            for (epoch, position), problems in zip(self._cursor, self._sources, strict=True)
        )

    def draw(self, count: int) -> list[Problem]:
        """Draw the next ``count`` problems.

        Raises:
            ValueError: if ``drop_pass_rate`` has left no problem in any data set.
        """
        return [self._next() for _ in range(count)]

    def record(self, problem: Problem, pass_rate: float) -> None:
        """Note the share of passes of one draw of ``problem`` (before the next ``draw``).

        Raises:
            ValueError: if ``pass_rate`` is outside [0, 1].
        """
        if not 0 <= pass_rate <= 1:
            raise ValueError(f"pass_rate: {pass_rate} must be between 0 and 1")
        key, decay = _key(problem), self._curriculum.decay
        old = self._history.get(key)
        self._history[key] = (
            float(pass_rate) if old is None else decay * old + (1 - decay) * pass_rate
        )

    def pass_rate(self, problem: Problem) -> float | None:
        """Moving average of the recorded pass rates of ``problem``; None if there are none."""
        return self._history.get(_key(problem))

    def state(self) -> dict[str, object]:
        """Everything that ``restore`` needs, as JSON values."""
        return {
            "seed": self._seed,
            "drawn": self._drawn,
            "cursor": [list(cursor) for cursor in self._cursor],
            "data": list(self._print),
            "history": dict(self._history),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state`` was taken.

        Raises:
            ValueError: if the seed or the data are others than the state's.
        """
        if state["seed"] != self._seed:
            raise ValueError(
                f"seed: {self._seed} differs from the checkpoint's {state['seed']}; resume with "
                "that one, or start a new run"
            )
        if list(state["data"]) != self._print:
            raise ValueError(
                "data: the problems differ from those of the checkpoint (other rows, order, "
                "prompts or split); resume with the same data, or start a new run"
            )
        self._drawn = int(state["drawn"])
        self._cursor = [[int(value) for value in cursor] for cursor in state["cursor"]]
        self._history = {str(key): float(rate) for key, rate in state["history"].items()}
        self._orders = {}

    def _next(self) -> Problem:
        left = list(range(len(self._sources)))
        while left:
            source = self._choose(left)
            problem = self._advance(source)
            if problem is not None:
                self._drawn += 1
                return problem
            left.remove(source)
        raise ValueError(
            f"drop_pass_rate: every problem has reached {self._curriculum.drop_pass_rate}; there "
            "is nothing left to learn: stop here, or add harder problems"
        )

    def _choose(self, among: Sequence[int]) -> int:
        """A data set by weight: the uniform hash of the draw index against exact fractions."""
        total = sum(self._weights[source] for source in among)
        point = Fraction(hash64("mixture", self._seed, self._drawn), WORD) * total
        for source in among:
            point -= self._weights[source]
            if point < 0:
                return source
        raise AssertionError("the weights sum to the total")

    def _advance(self, source: int) -> Problem | None:
        """Next problem of a data set that the curriculum lets through; None if all are dropped."""
        problems, cursor = self._sources[source], self._cursor[source]
        dropped = 0
        while dropped < len(problems):
            if cursor[1] == len(problems):
                cursor[:] = [cursor[0] + 1, 0]
            problem = problems[int(self._order(source, cursor[0])[cursor[1]])]
            uniform = hash64("curriculum", self._seed, source, *cursor) / WORD
            cursor[1] += 1
            rate = self._history.get(_key(problem))
            if uniform < self._curriculum.chance(rate):
                return problem
            dropped = dropped + 1 if self._curriculum.dropped(rate) else 0
        return None

    def _order(self, source: int, epoch: int) -> Int[Tensor, "N"]:
        known = self._orders.get(source)
        if known is None or known[0] != epoch:
            order = permutation(len(self._sources[source]), self._seed, source, epoch)
            known = self._orders[source] = (epoch, order)
        return known[1]


def _key(problem: Problem) -> str:
    return f"{problem.source}\t{problem.id}"


def _check_mixture(sources: Sequence[tuple[Problems, float]]) -> None:
    if not sources:
        raise ValueError("sources: there is none; give at least one data set")
    for number, (problems, weight) in enumerate(sources, start=1):
        if not len(problems):
            raise ValueError(f"sources: data set {number} has no problems; leave it out")
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight: {weight} of data set {number} must be above 0 and finite")
    _refuse_repeated([problems for problems, _ in sources])


def _refuse_repeated(sources: Sequence[Problems]) -> None:
    """Refuse two problems of one name and id, which pass rates could not tell apart.

    All are read once more, at each start and resume, and 24 bytes kept of each: streamed data may
    be larger than memory.
    """
    keys = array("q", (_hash(problem) for problems in sources for problem in problems))
    values = torch.frombuffer(keys, dtype=torch.int64).sort().values
    repeated = set(values[1:][values[1:] == values[:-1]].tolist())
    seen: set[str] = set()
    for problem in (p for problems in sources for p in problems) if repeated else ():
        if _hash(problem) not in repeated:
            continue
        if _key(problem) in seen:
            raise ValueError(
                f"sources: id {problem.id!r} of {problem.source!r} is there twice; ids must be "
                "unique in a data set: give equal ones another label"
            )
        seen.add(_key(problem))


def _hash(problem: Problem) -> int:
    """Hash of a problem's name and id, in the range of an int64."""
    return hash64(problem.source, problem.id) - WORD // 2


def _fingerprint(problems: Problems) -> str:
    """Hash of the size and of up to 4,096 problems spread over the data set."""
    size = len(problems)
    count = min(size, _RECOGNISED_BY)
    parts: list[str | int] = [size]
    for step in range(count):
        problem = problems[step * size // count]
        parts += [problem.source, problem.id, problem.answer or ""]
        parts += [text for message in problem.prompt for text in (message.role, message.content)]
    return f"{hash64(*parts):016x}"
