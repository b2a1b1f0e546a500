"""A calculator as a tool: exact arithmetic on what the policy writes, bounded in size and time.

The text is parsed as an expression and walked; nothing is evaluated as a program. Numbers are exact
fractions; powers whose result would be huge are refused before they are computed.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import ClassVar, Final, Literal

from gruppo.environment.base import ToolError
from gruppo.environment.calls import CallFormat
from gruppo.environment.tools import Tool, Toolbox, ToolEpisode
from gruppo.types import Message, Problem

_MAX_TEXT: Final = 200
_MAX_BITS: Final = 1024  # of a numerator or denominator: some 300 digits
_MAX_DIGITS: Final = 60  # of an answer
_ALLOWED: Final = re.compile(r"[0-9eE.+\-*/%() ]+")
_OPERATIONS: Final[dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """Calculate an arithmetic expression exactly.

    Args:
        expression: numbers with + - * / // % ** and parentheses.

    Returns:
        The value: whole numbers in digits, others as decimals of 12 digits.

    Raises:
        ToolError: the text is no such expression, divides by zero, or its value is too large.

    >>> calculate("12345678 * 87654321"), calculate("1 / 8")
    ('1082152022374638', '0.125')
    """
    text = expression.strip().removesuffix("=").replace("^", "**").replace("×", "*")
    if len(text) > _MAX_TEXT:
        raise ToolError(f"an expression has at most {_MAX_TEXT} characters")
    if not _ALLOWED.fullmatch(text):
        raise ToolError(f"{expression!r:.80} is no arithmetic: use numbers, + - * / // % ** and ()")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body, text.strip())
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError(f"{expression!r:.80} is no arithmetic expression") from None
    return _shown(value)


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            # from its text: 0.1 is one tenth, and 1e999 no infinity
            return _bounded(_number(ast.get_source_segment(text, node) or ""))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, text)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, text)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, text), _value(right, text))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _bounded(_OPERATIONS[type(op)](_value(left, text), _value(right, text)))
        case _:
            raise ValueError("no arithmetic")


def _number(text: str) -> Fraction:
    _, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > _MAX_DIGITS:
        raise _too_large()
    return Fraction(text)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("an exponent must be a whole number")
    if abs(exponent) * _bits(base) > _MAX_BITS and base not in (0, 1, -1):
        raise _too_large()
    # of 0, 1 and -1 only the parity of a huge exponent matters
    small = exponent if abs(exponent) <= _MAX_BITS else 2 + exponent % 2
    if base == 0 and exponent < 0:
        raise ZeroDivisionError
    return _bounded(Fraction(base ** int(small)))


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > _MAX_BITS:
        raise _too_large()
    return value


def _too_large() -> ToolError:
    return ToolError("the number is too large")


def _shown(value: Fraction) -> str:
    if value.denominator == 1:
        text = str(value.numerator)
        if len(text) > _MAX_DIGITS:
            raise _too_large()
        return text
    try:
        return f"{float(value):.12g}"
    except OverflowError:
        raise _too_large() from None


@cache
def _tool() -> Tool:
    made = Tool.of(calculate)
    return Tool(name="calculator", schema=_renamed(made.schema, "calculator"), run=made.run)


def _renamed(schema: Mapping[str, object], name: str) -> Mapping[str, object]:
    function = schema["function"]
    assert isinstance(function, dict), "a tool's schema has a function"
    return {**schema, "function": {**function, "name": name}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calculator:
    """The policy may call a calculator; the recipe's rewards grade its last turn.

    ``calls`` is how calls are written ("hermes", "llama" or "fenced": what the chat template
    shows), ``max_result`` the most characters of a result.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["calculator"] = "calculator"
    calls: CallFormat = "hermes"
    max_result: int = 100

    def __post_init__(self) -> None:
        self._box()

    @property
    def tools(self) -> tuple[Mapping[str, object], ...]:
        """The schema of the calculator."""
        return self._box().tools

    @property
    def instructions(self) -> str:
        """The same in words."""
        return self._box().instructions

    def prompt(self, problem: Problem) -> tuple[Message, ...]:
        """The problem's own prompt."""
        return problem.prompt

    def start(self, problem: Problem) -> ToolEpisode:
        """An episode; the problem is not looked at."""
        return self._box().start(problem)

    def _box(self) -> Toolbox:
        return Toolbox(items=(_tool(),), calls=self.calls, max_result=self.max_result)
