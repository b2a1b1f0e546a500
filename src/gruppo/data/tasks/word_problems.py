"""Word problems of one or two steps over small numbers: the task of the quick start.

Every problem has a *canonical key* for each step: the arithmetic and its operands, sorted where it
commutes (``"+ 3 4"`` for 3 + 4 and 4 + 3). The held-out split goes by these keys, so a pair of
numbers with an operation that is held out appears in training in no order, wording or with no
names; a two-step problem is held out if one of its steps is. Over 2..12 there are 66 sums, 55
differences, 66 products and 121 exact quotients: **308 keys**, each in 10 or 11 sentence forms with
80 names and 58 things.

It reads no file and knows no reward: the answer is the number as text.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from gruppo.data.keyed import Draws
from gruppo.data.tasks.base import Item, check_choices, check_range, check_whole
from gruppo.data.tasks.forms import CHANGES, ENDINGS, NOW, ONE_STEP, OPENINGS
from gruppo.data.tasks.vocabulary import CONTAINERS, PEOPLE, THINGS, Noun

ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
_UNITS = {
    many: Noun(one, many)
    for one, many in (
        ("friend", "friends"),
        ("person", "people"),
        ("dollar", "dollars"),
        ("day", "days"),
        ("week", "weeks"),
        ("row", "rows"),
        ("shelf", "shelves"),
    )
}


class Step(NamedTuple):
    """One piece of arithmetic: ``a symbol b``."""

    symbol: str
    a: int
    b: int

    @property
    def result(self) -> int:
        """Its value."""
        return ARITHMETIC[self.symbol](self.a, self.b)

    @property
    def key(self) -> str:
        """Canonical form, the same for 3 + 4 and 4 + 3.

        >>> Step("+", 4, 3).key, Step("-", 4, 3).key
        ('+ 3 4', '- 4 3')
        """
        a, b = sorted((self.a, self.b)) if self.symbol in "+*" else (self.a, self.b)
        return f"{self.symbol} {a} {b}"

    @property
    def work(self) -> str:
        """The calculation as text, ``3 + 4 = 7``."""
        return f"{self.a} {self.symbol} {self.b} = {self.result}"


class _Cast:
    """Who and what a problem is about; fills the fields of a sentence form."""

    __slots__ = ("_fields", "_nouns")

    def __init__(self, draws: Draws) -> None:
        person, other = draws.pick(PEOPLE, 2)
        thing, box = draws.choice(THINGS), draws.choice(CONTAINERS)
        self._fields = {
            "name": person.name,
            "he": person.he,
            "He": person.he.capitalize(),
            "him": person.him,
            "his": person.his,
            "other": other.name,
            "one": thing.one,
            "many": thing.many,
            "box": box.one,
            "boxes": box.many,
        }
        self._nouns = {**_UNITS, "s": thing, "boxes": box}

    def say(self, form: str, a: int, b: int) -> str:
        """Fill ``form`` with the numbers ``a`` and ``b``."""
        fields = {**self._fields, "a": str(a), "b": str(b)}
        fields["bmore"] = f"{b} more {fields['many']}"
        for name in re.findall(r"\{(\w+)\}", form):
            if name not in fields:  # a number and a noun, as in "adays"
                fields[name] = self._nouns[name[1:]].counted(a if name[0] == "a" else b)
        return form.format_map(fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordProblems:
    """Word problems with a non-negative whole number as answer.

    Args:
        operations: which kinds to draw from, evenly: "add" and "combine" (+), "subtract" (what is
            left) and "compare" (-), "multiply" (groups of) and "price" (*), "divide" (share
            equally) and "group" (how many groups) (/). Two-step problems use their arithmetic.
        steps: 1 or 2 calculations a problem.
        low: smallest operand, at least 2 (1 would make sentences and arithmetic degenerate).
        high: largest operand; a dividend may be as large as high * high, and the first operand of
            a second step is whatever the first step gave.

    Raises:
        ValueError: on an unknown operation, bad range, or operations that cannot follow each other.

    >>> item = WordProblems(operations=("add",))(seed=0, index=3)
    >>> item.answer == str(sum(item.info["steps"][0][1:3]))
    True
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    operations: tuple[str, ...] = tuple(ONE_STEP)
    steps: int = 1
    low: int = 2
    high: int = 12

    def __post_init__(self) -> None:
        check_choices("operations", self.operations, tuple(ONE_STEP))
        check_range(self.low, self.high, least=2, most=1_000_000)
        check_whole("steps", self.steps, least=1, most=2)
        if self.steps == 2 and self._symbols <= {"/"}:
            raise ValueError(
                'operations: a two-step problem cannot begin with a division; add "add", '
                '"subtract" or "multiply"'
            )

    @property
    def _symbols(self) -> set[str]:
        return {ONE_STEP[family][0] for family in self.operations}

    def __call__(self, seed: int, index: int) -> Item:
        """Return problem ``index`` of the endless sequence under ``seed``."""
        draws = Draws("word_problems", seed, index)
        return self._two(draws) if self.steps == 2 else self._one(draws)

    def _one(self, draws: Draws) -> Item:
        family = draws.choice(self.operations)
        symbol, forms = ONE_STEP[family]
        step = self._first(draws, symbol)
        question = _Cast(draws).say(draws.choice(forms), step.a, step.b)
        return _item(family, question, (step,))

    def _first(self, draws: Draws, symbol: str) -> Step:
        """Draw operands in [low, high]; a difference is positive, a quotient is in the range."""
        if symbol == "-":
            small, large = sorted(draws.pick(range(self.low, self.high + 1), 2))
            return Step("-", large, small)
        a, b = draws.between(self.low, self.high), draws.between(self.low, self.high)
        return Step("/", a * b, b) if symbol == "/" else Step(symbol, a, b)

    def _two(self, draws: Draws) -> Item:
        firsts = [symbol for symbol in "+-*" if symbol in self._symbols]
        for _ in range(1000):
            first = self._first(draws, draws.choice(firsts))
            seconds = self._seconds(first.result)
            if seconds and first.result >= self.low:
                second = Step(draws.choice(list(seconds)), first.result, 0)
                second = second._replace(b=draws.choice(seconds[second.symbol]))
                return _item("two_steps", _tell(draws, first, second), (first, second))
        raise ValueError(
            f"operations: {', '.join(self.operations)} cannot follow each other with numbers from "
            f"{self.low} to {self.high}; widen the range or allow more operations"
        )

    def _seconds(self, value: int) -> dict[str, list[int]]:
        """What may follow a first result: symbol -> its possible second operands."""
        numbers = range(self.low, self.high + 1)
        allowed = {
            "+": list(numbers),
            "-": [b for b in numbers if b < value],
            "*": list(numbers),
            "/": [b for b in numbers if value % b == 0],
        }
        return {symbol: bs for symbol, bs in allowed.items() if bs and symbol in self._symbols}


def _tell(draws: Draws, first: Step, second: Step) -> str:
    """Write the sentences of a two-step problem."""
    cast = _Cast(draws)
    changes = dict(CHANGES.values())
    endings = dict(ENDINGS.values())
    opening = OPENINGS["multiply" if first.symbol == "*" else "has"]
    parts = [cast.say(draws.choice(opening), first.a, first.b)]
    if first.symbol != "*":
        parts.append(cast.say(draws.choice(changes[first.symbol]), first.a, first.b))
    tail = endings.get(second.symbol) or changes[second.symbol]
    parts.append(cast.say(draws.choice(tail), second.a, second.b))
    if second.symbol not in endings:
        parts.append(cast.say(draws.choice(NOW), second.a, second.b))
    return " ".join(parts)


def _item(operation: str, question: str, steps: tuple[Step, ...]) -> Item:
    return Item(
        question=question,
        answer=str(steps[-1].result),
        keys=tuple(step.key for step in steps),
        info={
            "operation": operation,
            "work": ", ".join(step.work for step in steps),
            "steps": [[step.symbol, step.a, step.b, step.result] for step in steps],
        },
    )
