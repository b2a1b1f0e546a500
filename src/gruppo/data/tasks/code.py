"""Small programming tasks: write a Python function of a list or a number, in one to three steps.

A task is a chain of operations ("keep the even numbers", "double each", "add them up"; of a number
"multiply it by 3", "subtract 5"). Its tests are made by running the chain here, so they are right
by construction; a reference program is the answer. The names, the wording and the numbers are
drawn; no problem needs a download.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from gruppo.data.keyed import Draws
from gruppo.data.tasks.base import Item, check_choices, check_whole


@dataclass(frozen=True, slots=True)
class _Step:
    """One operation: how it is said, how it is written (of ``x``), and what it does."""

    name: str
    said: tuple[str, ...]
    code: str
    run: Callable[[Any, int], Any]


@dataclass(frozen=True, slots=True)
class _End:
    """The last operation, whose value is returned in place of ``x``."""

    name: str
    said: tuple[str, ...]
    code: str
    run: Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _About:
    """What functions are of: its name, that of what comes out, operations and their largest k."""

    said: str
    result: str
    most: int
    steps: tuple[_Step, ...]
    ends: tuple[_End, ...]


# "{k}" is a number drawn for the task.
_STEPS: Final = (
    _Step(
        "even",
        ("keep only the even numbers", "drop every odd number"),
        "[n for n in x if n % 2 == 0]",
        lambda x, k: [n for n in x if n % 2 == 0],
    ),
    _Step(
        "odd",
        ("keep only the odd numbers", "drop every even number"),
        "[n for n in x if n % 2 == 1]",
        lambda x, k: [n for n in x if n % 2 == 1],
    ),
    _Step(
        "above",
        ("keep only the numbers above {k}", "drop the numbers that are {k} or less"),
        "[n for n in x if n > {k}]",
        lambda x, k: [n for n in x if n > k],
    ),
    _Step(
        "add",
        ("add {k} to each number", "increase every number by {k}"),
        "[n + {k} for n in x]",
        lambda x, k: [n + k for n in x],
    ),
    _Step(
        "times",
        ("multiply each number by {k}", "replace every number by {k} times itself"),
        "[n * {k} for n in x]",
        lambda x, k: [n * k for n in x],
    ),
    _Step(
        "square",
        ("square each number", "replace every number by its square"),
        "[n * n for n in x]",
        lambda x, k: [n * n for n in x],
    ),
    _Step(
        "reverse",
        ("reverse the list", "turn the order of the numbers around"),
        "x[::-1]",
        lambda x, k: x[::-1],
    ),
    _Step(
        "sort",
        ("sort the numbers from small to large", "put the numbers in ascending order"),
        "sorted(x)",
        lambda x, k: sorted(x),
    ),
    _Step(
        "first",
        ("keep only the first {k} numbers", "drop everything after the first {k} numbers"),
        "x[:{k}]",
        lambda x, k: x[:k],
    ),
    _Step(
        "skip",
        ("drop the first {k} numbers", "leave out the first {k} numbers"),
        "x[{k}:]",
        lambda x, k: x[k:],
    ),
    _Step(
        "unique",
        (
            "drop repeated numbers, keeping the first of each",
            "keep each number only once, in order",
        ),
        "list(dict.fromkeys(x))",
        lambda x, k: list(dict.fromkeys(x)),
    ),
)
_ENDS: Final = (
    _End("sum", ("their sum", "the sum of the numbers"), "sum(x)", sum),
    _End("count", ("how many there are", "the number of entries left"), "len(x)", len),
    _End(
        "largest",
        ("the largest one, or 0 if there is none", "their maximum, 0 if nothing is left"),
        "max(x, default=0)",
        lambda x: max(x, default=0),
    ),
    _End(
        "smallest",
        ("the smallest one, or 0 if there is none", "their minimum, 0 if nothing is left"),
        "min(x, default=0)",
        lambda x: min(x, default=0),
    ),
)
_OF_A_NUMBER: Final = (
    _Step("plus", ("add {k}", "increase it by {k}"), "x + {k}", lambda x, k: x + k),
    _Step("minus", ("subtract {k}", "decrease it by {k}"), "x - {k}", lambda x, k: x - k),
    _Step(
        "times",
        ("multiply it by {k}", "take {k} times the number"),
        "x * {k}",
        lambda x, k: x * k,
    ),
    _Step("square", ("square it", "multiply it by itself"), "x * x", lambda x, k: x * x),
    _Step("negate", ("change its sign", "multiply it by -1"), "-x", lambda x, k: -x),
    _Step(
        "from",
        ("subtract it from {k}", "take {k} minus the number"),
        "{k} - x",
        lambda x, k: k - x,
    ),
)
_ENDS_OF_A_NUMBER: Final = (
    _End("distance", ("its absolute value", "how far it is from 0"), "abs(x)", abs),
    _End("twice", ("twice that", "its double"), "2 * x", lambda x: 2 * x),
)
_SUBJECTS: Final[dict[str, _About]] = {
    "list": _About(
        said="a list of whole numbers",
        result="the resulting list",
        most=5,
        steps=_STEPS,
        ends=_ENDS,
    ),
    "number": _About(
        said="a whole number",
        result="the result",
        most=9,
        steps=_OF_A_NUMBER,
        ends=_ENDS_OF_A_NUMBER,
    ),
}
_NAMES: Final = ("solve", "transform", "process", "compute", "work_out", "apply_steps")
_EMPTY: Final = 12  # one graded list in so many is empty


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTasks:
    """Write a function that does a few things to a list of whole numbers, or to one number.

    ``info["tests"]`` holds the cases for the reward ``code``, as JSON; ``answer`` is a program that
    passes them. No input that the question shows is among them, so that repeating what it says of
    that one earns nothing; now and then a list is empty. A constant answer is still right for
    single cases of lists: let the reward want all (``score = "all"``). The split key is the chain
    of operations without numbers, wording or function name, so that no task of a held-out chain is
    in training.

    Args:
        steps: operations on the list, 1 to 3, before the result.
        cases: test cases, 2 to 20.
        shown: further cases, at most 5, that the question shows as examples.
        of: "list" or "number" (easier): what the function is given.

    >>> item = CodeTasks()(seed=0, index=0)
    >>> "def " in item.answer and item.info["tests"].startswith('{"function"')
    True
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    steps: int = 2
    cases: int = 6
    shown: int = 1
    of: str = "list"

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, least=1, most=3)
        check_whole("cases", self.cases, least=2, most=20)
        check_whole("shown", self.shown, least=0, most=5)
        check_choices("of", [self.of], tuple(_SUBJECTS))

    def __call__(self, seed: int, index: int) -> Item:
        """Return task ``index`` of the sequence under ``seed``."""
        draws, about = Draws("code_tasks", seed, index), _SUBJECTS[self.of]
        steps = [
            (step, draws.between(2, about.most)) for step in draws.pick(about.steps, self.steps)
        ]
        end = draws.choice((None, *about.ends))
        name = draws.choice(_NAMES)
        said = [draws.choice(step.said).format(k=k) for step, k in steps]
        result = about.result if end is None else draws.choice(end.said)

        def run(x: Any) -> Any:
            for step, k in steps:
                x = step.run(x, k)
            return x if end is None else end.run(x)

        inputs = self._inputs(draws)
        cases = [{"args": [value], "expected": run(value)} for value in inputs[self.shown :]]
        shown = "".join(
            f"\nExample: {name}({value}) returns {run(value)!r}." for value in inputs[: self.shown]
        )
        return Item(
            question=(
                f"Write a Python function {name}(x) of {about.said}: "
                f"{', then '.join(said)}, and return {result}.{shown}"
            ),
            answer=_program(name, steps, end),
            keys=(" ".join([*(step.name for step, _ in steps), end.name if end else self.of]),),
            info={"tests": json.dumps({"function": name, "cases": cases})},
        )

    def _inputs(self, draws: Draws) -> list[Any]:
        """Inputs that all differ: first those that are shown, then those that are graded."""
        found: list[Any] = []
        while len(found) < self.shown + self.cases:
            graded = len(found) >= self.shown
            value = _number(draws) if self.of == "number" else _list(draws, may_be_empty=graded)
            if value not in found:
                found.append(value)
        return found


def _list(draws: Draws, *, may_be_empty: bool) -> list[int]:
    """A list with some repetitions and some order, so that each operation shows."""
    if may_be_empty and draws.below(_EMPTY) == 0:
        return []
    return [draws.between(-5, 12) for _ in range(draws.between(2, 10))]


def _number(draws: Draws) -> int:
    """A number of one or two digits, of either sign."""
    return draws.between(-20, 40)


def _program(name: str, steps: Sequence[tuple[_Step, int]], end: _End | None) -> str:
    lines = [f"    x = {step.code.format(k=k)}" for step, k in steps]
    return "\n".join([f"def {name}(x):", *lines, f"    return {end.code if end else 'x'}"])
