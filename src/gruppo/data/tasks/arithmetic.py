"""Arithmetic: one calculation, bare or in words, or the larger of two numbers.

The bare question is the expression alone (``"3 + 4"``); the prompt template adds words where
wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gruppo.data.keyed import Draws
from gruppo.data.tasks.base import Item, check_choices, check_range, check_whole
from gruppo.data.tasks.word_problems import Step

WORDINGS: dict[str, tuple[str, ...]] = {
    "+": (
        "{a} + {b}",
        "What is {a} + {b}?",
        "{a} plus {b}",
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
    ),
    "-": (
        "{a} - {b}",
        "What is {a} - {b}?",
        "{a} minus {b}",
        "Subtract {b} from {a}.",
        "How much is {a} minus {b}?",
    ),
    "*": (
        "{a} * {b}",
        "What is {a} * {b}?",
        "{a} times {b}",
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?",
    ),
    "/": (
        "{a} / {b}",
        "What is {a} / {b}?",
        "{a} divided by {b}",
        "Divide {a} by {b}.",
        "How many times does {b} go into {a}?",
    ),
}
"""Ways to ask for a calculation; the first is the bare expression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """One calculation with whole numbers; differences are never negative, quotients are exact.

    The split key is the calculation with sorted operands where it commutes, so 4 + 3 is never in
    training when 3 + 4 is held out.

    Args:
        operations: some of "+", "-", "*", "/".
        low: smallest operand, at least 1.
        high: largest operand (of a division: largest divisor and quotient).
        wordings: how many of the five ways to ask are drawn from; 1 is the bare expression.

    >>> Arithmetic(operations=("*",))(seed=0, index=0).question
    '5 * 3'
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    operations: tuple[str, ...] = ("+", "-", "*")
    low: int = 2
    high: int = 12
    wordings: int = 1

    def __post_init__(self) -> None:
        check_choices("operations", self.operations, tuple(WORDINGS))
        check_range(self.low, self.high, least=1, most=1_000_000)
        check_whole("wordings", self.wordings, least=1, most=len(WORDINGS["+"]))

    def __call__(self, seed: int, index: int) -> Item:
        """Return calculation ``index`` of the sequence under ``seed``."""
        draws = Draws("arithmetic", seed, index)
        symbol = draws.choice(self.operations)
        a, b = draws.between(self.low, self.high), draws.between(self.low, self.high)
        if symbol == "-":
            a, b = max(a, b), min(a, b)
        step = Step("/", a * b, b) if symbol == "/" else Step(symbol, a, b)
        return Item(
            question=draws.choice(WORDINGS[symbol][: self.wordings]).format(a=step.a, b=step.b),
            answer=str(step.result),
            keys=(step.key,),
            info={"operation": symbol, "operands": [step.a, step.b]},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The larger of two different numbers; the split key is the unordered pair.

    Args:
        low: smallest number, at least 0.
        high: largest number.

    >>> Comparison(low=1, high=2)(seed=0, index=0).answer
    '2'
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    low: int = 1
    high: int = 999

    def __post_init__(self) -> None:
        check_range(self.low, self.high, least=0, most=1_000_000_000)

    def __call__(self, seed: int, index: int) -> Item:
        """Return pair ``index`` of the sequence under ``seed``."""
        draws = Draws("comparison", seed, index)
        a = draws.between(self.low, self.high)
        b = draws.between(self.low, self.high - 1)
        b += b >= a  # skips a, so that the pair is uniform over different numbers
        return Item(
            question=f"Which number is larger, {a} or {b}?",
            answer=str(max(a, b)),
            keys=(f"{min(a, b)} {max(a, b)}",),
            info={"numbers": [a, b]},
        )
