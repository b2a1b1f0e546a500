"""The reward of Countdown: an expression that uses the given numbers and reaches the target.

The policy's text is never run: it is parsed as arithmetic and evaluated in exact fractions.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Final, Literal

from gruppo.reward.base import Value, ungraded
from gruppo.reward.extract import TEMPLATES, after_thinking, find_answer
from gruppo.types import Completion, Problem

_MAX_TEXT: Final = 200  # characters; six numbers need some forty, and parsing stays instant
_ARITHMETIC: Final = re.compile(r"[0-9+\-*/() ]+")
_EQUALS: Final = re.compile(r"\s*=\s*-?\d+\s*$")
_OPERATIONS: Final[dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Countdown:
    """1 if the answer is an expression of ``info["numbers"]``, each once, equal to ``target``.

    ``where`` says where the answer stands: in the ``<answer>`` tag, in the last ``boxed``, after
    ``hashes`` (``####``), or that it is ``all`` after ``</think>``. Allowed are + - * / and
    parentheses; a closing ``= 24`` is ignored. A problem without numbers or target is unscored.

    Example:
        >>> from gruppo.types import Completion, Problem
        >>> row = Completion(tokens=(), logp=(), mask=(), version=(), finish="stop",
        ...                  text="<answer>(3 - 1) * 12 = 24</answer>")
        >>> problem = Problem(id="a", prompt=(), info={"numbers": [1, 3, 12], "target": 24})
        >>> Countdown()(problem, [row])
        [1.0]
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["countdown"] = "countdown"
    where: Literal["all", "answer_tag", "boxed", "hashes"] = "answer_tag"

    def template(self) -> str:
        """A completion with ``{answer}``, a solution, where the expression is read."""
        return TEMPLATES[self.where]

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade ``completions``."""
        numbers, target = problem.info.get("numbers"), problem.info.get("target")
        if not isinstance(numbers, list | tuple) or not isinstance(target, int):
            text = f"problem {problem.id!r} has no numbers and target: use the task countdown"
            return [ungraded("gold_missing", text)] * len(completions)
        given = [int(number) for number in numbers]
        return [self._grade(completion.text, given, target) for completion in completions]

    def _grade(self, text: str, numbers: list[int], target: int) -> float:
        where = self.where
        answer = after_thinking(text) if where == "all" else find_answer(text, where).text
        value = evaluate(_EQUALS.sub("", answer.strip()), numbers)
        return float(value == target)


def evaluate(expression: str, numbers: Sequence[int]) -> Fraction | None:
    """Exact value of an expression that uses ``numbers``, each once; None if it is none.

    >>> evaluate("(1 + 2) / 3", [3, 2, 1]), evaluate("1 + 1", [1, 2]), evaluate("2 ** 3", [2, 3])
    (Fraction(1, 1), None, None)
    """
    if len(expression) > _MAX_TEXT or not _ARITHMETIC.fullmatch(expression):
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        used: list[int] = []
        value = _value(tree, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value if Counter(used) == Counter(numbers) else None


def _value(node: ast.expr, used: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int() as number):
            used.append(number)
            return Fraction(number)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left, used), _value(right, used))
        case _:
            raise ValueError(f"not arithmetic: {ast.dump(node)[:40]}")
