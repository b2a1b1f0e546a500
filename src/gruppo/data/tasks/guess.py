"""Guess a number: the problems of the guessing game (environment ``guessing_game``).

The answer is the number to find; the question says between which two it lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gruppo.data.keyed import Draws
from gruppo.data.tasks.base import Item, check_range, check_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """A whole number in a range that differs from problem to problem; the split key is the range.

    Args:
        low: smallest number of all ranges, at least 0.
        high: largest number of all ranges.
        span: how many numbers a range holds.

    >>> Guess(span=10)(seed=0, index=0).question
    'I think of a whole number from 724 to 733. Guess it.'
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    low: int = 1
    high: int = 1000
    span: int = 20

    def __post_init__(self) -> None:
        check_range(self.low, self.high, least=0, most=1_000_000)
        check_whole("span", self.span, least=2, most=self.high - self.low + 1)

    def __call__(self, seed: int, index: int) -> Item:
        """Return problem ``index`` of the sequence under ``seed``."""
        draws = Draws("guess", seed, index)
        first = draws.between(self.low, self.high - self.span + 1)
        last = first + self.span - 1
        secret = draws.between(first, last)
        return Item(
            question=f"I think of a whole number from {first} to {last}. Guess it.",
            answer=str(secret),
            keys=(f"{first} {last}",),
            info={"range": [first, last]},
        )
