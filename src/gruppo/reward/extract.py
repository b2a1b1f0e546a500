"""Where the final answer stands in a completion, and which exact number it is.

Text in, text or ``Fraction`` out; nothing here evaluates an expression. Only the standard library
is imported, because grading workers load this file too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Final, Literal

Where = Literal["last", "answer_tag", "boxed", "hashes"]

# A completion that gives ``{answer}`` where it is looked for ("all": everything is the answer).
TEMPLATES: Final[dict[str, str]] = {
    "all": "{answer}",
    "last": "{answer}",
    "answer_tag": "<answer>{answer}</answer>",
    "boxed": r"\boxed{{answer}}",
    "hashes": "#### {answer}",
}

# An answer longer than this is no answer to a question with a short one.
MAX_ANSWER = 2000
# 10**400 and 400 digits hold every sane answer; Fraction("1e999999999") would eat the memory.
_MAX_EXPONENT = 400

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+(?![\d.]))?"
    r"|(?<![\w.])[-+]?\.\d+(?:[eE][-+]?\d+)?"
)
_WHOLE = re.compile(
    r"(?P<num>[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE](?P<exp>[-+]?\d+))?)"
    r"(?:\s*/\s*(?P<den>\d+))?"
)
_LATEX_FRACTION = re.compile(
    r"(?P<sign>[-+]?)\\[dt]?frac\s*(?:\{(?P<a>\d+)\}|(?P<c>\d))\s*(?:\{(?P<b>\d+)\}|(?P<d>\d))"
)
_MINUS = str.maketrans({"−": "-", "\u2013": "-", "\u00a0": " ", "\u202f": " "})


@dataclass(frozen=True, slots=True)
class Answer:
    """The text found, or why there is none (``problem``: a short kind name)."""

    text: str = ""
    problem: str | None = None


def after_thinking(text: str) -> str:
    """Return what follows the last ``</think>``; nothing if the thinking was never closed.

    >>> after_thinking("<think>is it 3?</think> 4")
    ' 4'
    >>> after_thinking("<think>is it 3?")
    ''
    """
    _, closed, rest = text.rpartition("</think>")
    if closed:
        return rest
    return "" if "<think>" in text else text


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` with balanced braces, or None.

    >>> last_boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    starts = [m.end() for m in re.finditer(r"\\(?:f?boxed)\s*\{", text)]
    if not starts:
        return None
    depth, start = 1, starts[-1]
    for position, char in enumerate(text[start:], start):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[start:position]
    return None


def find_answer(text: str, where: Where, *, most: int = MAX_ANSWER) -> Answer:
    r"""Find the final answer of a completion, after its thinking.

    ``last`` is the last number of the text, ``answer_tag`` the one ``<answer>`` element (several
    are refused: they would be several guesses), ``boxed`` the last ``\boxed{}``, ``hashes`` what
    follows the last ``####`` on its line.
    """
    finder = _FINDERS[where]
    answer = finder(after_thinking(text))
    if len(answer.text) > most:
        return Answer(problem="oversize")
    return answer


def _find_last(text: str) -> Answer:
    # "$" and "*" only decorate numbers: "-$3", "**72**".
    plain = re.sub(r"\\?[$*]", "", text).translate(_MINUS)
    found = [match.group() for match in _NUMBER.finditer(plain)]
    return Answer(found[-1]) if found else Answer(problem="no_answer")


def _find_tag(text: str) -> Answer:
    if "<answer>" not in text or "</answer>" not in text:
        return Answer(problem="no_answer")
    if text.count("<answer>") > 1 or text.count("</answer>") > 1:
        return Answer(problem="many_answers")
    _, _, rest = text.partition("<answer>")
    content, closed, _ = rest.partition("</answer>")
    return _filled(content) if closed else Answer(problem="no_answer")


def _find_boxed(text: str) -> Answer:
    content = last_boxed(text)
    return Answer(problem="no_answer") if content is None else _filled(content)


def _find_hashes(text: str) -> Answer:
    _, found, rest = text.rpartition("####")
    return _filled(rest.strip().partition("\n")[0]) if found else Answer(problem="no_answer")


def _filled(content: str) -> Answer:
    content = content.strip()
    return Answer(content) if content else Answer(problem="no_answer")


_FINDERS = {
    "last": _find_last,
    "answer_tag": _find_tag,
    "boxed": _find_boxed,
    "hashes": _find_hashes,
}


def one_number(text: str) -> Fraction | None:
    """Return the number of a short answer that holds exactly one, with or without a unit.

    >>> one_number("$1,234.50 in all"), one_number("3 or 4"), one_number("12:30")
    (Fraction(2469, 2), None, None)
    """
    whole = to_fraction(text)
    if whole is not None:
        return whole
    plain = re.sub(r"\\?[$*]", "", text).translate(_MINUS)
    found = _NUMBER.findall(plain)
    # Any digit outside the one number (x2, 12:30, 3^2) makes it another number.
    if len(found) != 1 or re.search(r"\d|[\^*/+\\]", plain.replace(found[0], "", 1)):
        return None
    return to_fraction(found[0])


def to_fraction(text: str) -> Fraction | None:
    r"""Return the exact value of a plain number, or None if the text is not just a number.

    Thousands separators, decimals, exponents, ``a/b`` and ``\frac{a}{b}`` of integers, a leading
    or trailing dollar sign. A percent sign is not read here: its meaning depends on the question.

    >>> to_fraction("1,000"), to_fraction("1e-2"), to_fraction(r"-\frac{3}{4}"), to_fraction("x")
    (Fraction(1000, 1), Fraction(1, 100), Fraction(-3, 4), None)
    """
    plain = text.translate(_MINUS).strip().strip("$").removeprefix("\\").strip("$ ")
    plain = (
        text.translate(_MINUS).strip() if plain.startswith(("frac", "dfrac", "tfrac")) else plain
    )
    plain = plain.removesuffix(".").replace("\\!", "").replace("{,}", ",")
    if not plain or len(plain) > _MAX_EXPONENT:
        return None
    if latex := _LATEX_FRACTION.fullmatch(plain):
        top, bottom = int(latex["a"] or latex["c"]), int(latex["b"] or latex["d"])
        return Fraction(-top if latex["sign"] == "-" else top, bottom) if bottom else None
    match = _WHOLE.fullmatch(plain)
    if match is None or not re.search(r"\d", match["num"]):
        return None
    if match["exp"] is not None and (
        len(match["exp"]) > 5 or abs(int(match["exp"])) > _MAX_EXPONENT
    ):
        return None
    try:
        value = Fraction(Decimal(match["num"].replace(",", "")))
    except ArithmeticError:  # "e5": an exponent without digits before it
        return None
    divisor = int(match["den"] or 1)
    return value / divisor if divisor else None
