"""Shaping terms: what a completion's length or repetition costs, beside its task reward.

Lengths are the policy's own tokens, the end token included (not those of a tool). ``SoftOverlong``
and ``Repetition`` look at one completion alone; the others are ``Shaping`` records that read how
the group was graded. They return raw values; the part's weight scales them. Unscored rows get no
term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from gruppo.types import Completion, Problem, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftOverlong:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13).

    With n tokens: 0 up to ``max_tokens - buffer``, then linearly down to -1 at ``max_tokens`` and
    beyond; times ``factor``.

    Example:
        >>> overlong = SoftOverlong(max_tokens=100, buffer=20)
        >>> [overlong.value(n) for n in (80, 90, 100, 101)]
        [0.0, -0.5, -1.0, -1.0]

    Raises:
        ValueError: ``buffer`` not within 1 .. ``max_tokens``, or ``factor`` not positive.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["soft_overlong"] = "soft_overlong"
    max_tokens: int
    buffer: int
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.buffer <= self.max_tokens:
            raise ValueError(
                f"soft_overlong.buffer = {self.buffer}: it must be between 1 and max_tokens "
                f"({self.max_tokens}); leave the part out to have no overlong punishment"
            )
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ValueError(f"soft_overlong.factor = {self.factor}: it must be positive")

    def value(self, num_tokens: int) -> float:
        """Return the term of a completion of ``num_tokens`` tokens."""
        over = num_tokens - (self.max_tokens - self.buffer)
        return -self.factor * min(max(over / self.buffer, 0.0), 1.0) if over > 0 else 0.0

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[float]:
        """Return the term of every completion; the problem is not read."""
        return [self.value(len(completion.own_tokens)) for completion in completions]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """``max_penalty`` * (1 - distinct / total) over the n-grams of token ids (arXiv 2502.03373).

    Fewer than ``n`` tokens: 0.

    Example:
        >>> Repetition(n=2).value((5, 5, 5, 5, 5))
        -0.75

    Raises:
        ValueError: ``n`` below 1 or a positive ``max_penalty``.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["repetition"] = "repetition"
    n: int = 3
    max_penalty: float = -1.0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"repetition.n = {self.n}: n-grams need n of at least 1")
        if not (math.isfinite(self.max_penalty) and self.max_penalty <= 0):
            raise ValueError(
                f"repetition.max_penalty = {self.max_penalty}: a penalty is negative, e.g. -1.0"
            )

    def value(self, tokens: Sequence[int]) -> float:
        """Return the term of one completion."""
        total = len(tokens) - self.n + 1
        if total < 1:
            return 0.0
        distinct = len({tuple(tokens[i : i + self.n]) for i in range(total)})
        return self.max_penalty * (1 - distinct / total) if distinct < total else 0.0

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[float]:
        """Return the term of every completion; the problem is not read."""
        return [self.value(completion.own_tokens) for completion in completions]


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineLength:
    """Cosine length reward (arXiv 2502.03373, section 4): short and right is best.

    With p = min(n / ``max_tokens``, 1) the term runs along half a cosine from ``right_short`` at p
    = 0 to ``right_long`` at p = 1 (a wrong row's from ``wrong_short`` to ``wrong_long``); a row is
    right if its task metric is at least ``right_at``. The paper uses this *instead of* the 0/1
    accuracy: give the accuracy part weight 0 for that. The paper's extra penalty for exceeding the
    budget is left to ``SoftOverlong``.

    Example:
        >>> CosineLength(max_tokens=100).value(50, right=True)
        0.75

    Raises:
        ValueError: ``max_tokens`` below 1.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["cosine_length"] = "cosine_length"
    max_tokens: int
    right_short: float = 1.0
    right_long: float = 0.5
    wrong_short: float = -1.0
    wrong_long: float = -0.5
    right_at: float = 0.5

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"cosine_length.max_tokens = {self.max_tokens}: it must be at least 1")

    def value(self, num_tokens: int, *, right: bool) -> float:
        """Return the term of a completion of ``num_tokens`` tokens."""
        short, long = (
            (self.right_short, self.right_long) if right else (self.wrong_short, self.wrong_long)
        )
        progress = min(num_tokens / self.max_tokens, 1.0)
        return long + 0.5 * (short - long) * (1 + math.cos(math.pi * progress))

    def shape(
        self, problem: Problem, completions: Sequence[Completion], scores: Sequence[Score]
    ) -> list[float | None]:
        """Return the term of every completion; the problem is not read."""
        return [
            None
            if score.task is None
            else self.value(len(completion.own_tokens), right=score.task >= self.right_at)
            for completion, score in zip(completions, scores, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiLength:
    """Length reward within a group (Kimi k1.5, arXiv 2501.12599, section 2.3.3).

    lambda = 0.5 - (n - min) / (max - min) over the group's scored rows; right rows (of a task
    metric of at least ``right_at``) get lambda, wrong rows min(0, lambda); 0 if all are equally
    long. The paper switches it on after a warm-up without it.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["kimi_length"] = "kimi_length"
    right_at: float = 0.5

    def shape(
        self, problem: Problem, completions: Sequence[Completion], scores: Sequence[Score]
    ) -> list[float | None]:
        """Return the term of every completion; the problem is not read."""
        pairs = list(zip((len(c.own_tokens) for c in completions), scores, strict=True))
        lengths = [length for length, score in pairs if score.task is not None]
        shortest, longest = min(lengths, default=0), max(lengths, default=0)

        def term(length: int, task: float | None) -> float | None:
            if task is None or shortest == longest:
                return None if task is None else 0.0
            value = 0.5 - (length - shortest) / (longest - shortest)
            return value if task >= self.right_at else min(0.0, value)

        return [term(length, score.task) for length, score in pairs]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLength:
    """-mean(total) * n / max(n) within a group: the group length penalty of prime-rl.

    The mean is over the scored rows' totals before shaping, so a group that earns nothing is not
    pushed to be short. The part's weight is the strength of the penalty.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["linear_length"] = "linear_length"

    def shape(
        self, problem: Problem, completions: Sequence[Completion], scores: Sequence[Score]
    ) -> list[float | None]:
        """Return the term of every completion; the problem is not read."""
        pairs = list(zip((len(c.own_tokens) for c in completions), scores, strict=True))
        totals = [score.total for _, score in pairs if score.total is not None]
        longest = max((n for n, score in pairs if score.total is not None), default=0)
        if not totals or longest == 0:
            return [None if score.total is None else 0.0 for _, score in pairs]
        mean = math.fsum(totals) / len(totals)
        return [None if score.total is None else -mean * n / longest for n, score in pairs]
