"""Countdown: reach a target from given numbers, each used once.

``answer`` is one solution; others are right too, so a checker evaluates the expression against
``info["numbers"]`` and ``info["target"]`` (the task of TinyZero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gruppo.data.keyed import Draws
from gruppo.data.tasks.base import Item, check_range, check_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Countdown:
    """Make ``target`` from ``numbers`` with +, -, * and parentheses.

    Every problem is solvable: numbers are joined from left to right, and steps that would leave
    [1, max_target] are not taken (the difference is turned round where it would be negative). The
    split key is the sorted numbers, so that no other target for the same numbers is in training.

    Args:
        count: how many numbers, 2 to 6.
        low: smallest number, at least 1.
        high: largest number.
        max_target: largest target, at least count * high (so that sums are always allowed).

    >>> item = Countdown()(seed=0, index=0)
    >>> eval(item.answer) == item.info["target"]
    True
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    count: int = 3
    low: int = 1
    high: int = 20
    max_target: int = 100

    def __post_init__(self) -> None:
        check_whole("count", self.count, least=2, most=6)
        check_range(self.low, self.high, least=1, most=10_000)
        check_whole("max_target", self.max_target, least=self.count * self.high, most=10**9)

    def __call__(self, seed: int, index: int) -> Item:
        """Return problem ``index`` of the sequence under ``seed``."""
        draws = Draws("countdown", seed, index)
        numbers = [draws.between(self.low, self.high) for _ in range(self.count)]
        order = draws.pick(numbers, self.count)
        value, text = order[0], str(order[0])
        for position, number in enumerate(order[1:], start=2):
            # What the numbers still to come add at most, if only sums are left.
            rest = self.high * (self.count - position)
            value, text = draws.choice(self._moves(value, text, number, self.max_target - rest))
            if position < self.count:
                text = f"({text})"
        shown = ", ".join(map(str, numbers))
        return Item(
            question=(
                f"Use the numbers {shown}, each exactly once, with +, - and * to make {value}. "
                "Answer with an expression."
            ),
            answer=text,
            keys=(" ".join(map(str, sorted(numbers))),),
            info={"numbers": numbers, "target": value},
        )

    def _moves(self, value: int, text: str, number: int, limit: int) -> list[tuple[int, str]]:
        moves = [
            (value + number, f"{text} + {number}"),
            (value * number, f"{text} * {number}"),
            (value - number, f"{text} - {number}"),
            (number - value, f"{number} - {text}"),
        ]
        return [move for move in moves if 1 <= move[0] <= limit]
