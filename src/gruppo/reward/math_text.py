r"""Two short mathematical answers as texts: equal, different, or a case for symbolic mathematics.

Decided here, exactly: numbers (``readings.py``), choices, clock times, words, sets against points.
Nothing is evaluated and no process is started.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from gruppo.reward.base import Value, refused, ungraded
from gruppo.reward.extract import last_boxed
from gruppo.reward.readings import Reading, based, exact, read_number

_WORDS = re.compile(r"[A-Za-z][A-Za-z' .-]*")
_LONG_WORD = re.compile(r"[A-Za-z]{4,}")
_MATH_WORD = re.compile(r"sqrt|frac|infty|theta|alpha|beta|gamma|delta|lambda|\b(?:cos|sin|tan)")
_TIME = re.compile(r"\d{1,2}:\d{2}(?::\d{2})?\s*(?:[ap]\.?\s*m\.?)?", re.IGNORECASE)
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_CHOICE_GIVEN = re.compile(r"\(?([A-Za-z])(?:[).:](.*))?", re.DOTALL)
# Without the reference, "A" may be a variable: its case counts, and only "A) ..." is a choice.
_CHOICE_VOTED = re.compile(r"\(?([A-Za-z])[).:]?|\(?([A-Z])\)\s+(\w.*)", re.DOTALL)
_HEDGE = re.compile(r"\b[A-Z]\)|\b(?:or|and)\b")
_ELLIPSIS = re.compile(r"\\[lcdv]?dots[cbmio]?\b|\.\.\.|…")
# Two numbers side by side: the grammar would add them up ("1 2" is 3 to it).
_SIDE_BY_SIDE = re.compile(r"\d\s+[\d.]")
_TWO_ARGUMENTS = re.compile(r"\\[dt]?(?:frac|binom)\s*\d\s*\d|[_^]\s*\d\b")
_SHORT_WORDS = frozenset({"yes", "no", "odd", "all", "any", "dne"})
_NOTATION = re.compile(r"\d\.?[eE]|\\overline|\\dot|\\times|\d\s+\d|\\[dt]?frac")
_WRAPPER = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit)\s*\{([^{}]*)\}")
_UPRIGHT = re.compile(r"\\(?:mathrm|text|operatorname)\s*\{\s*([ei])\s*\}")
_SPACE = re.compile(r"\\[,;:! ]|~|\\quad|\\left|\\right|\s+")

# No sane answer nests deeper; the grammar takes exponential time on those that do.
_MAX_DEPTH = 24


@lru_cache(maxsize=65536)
def tidy(text: str) -> str:
    r"""Return an answer without its dollar signs, box and final full stop.

    >>> tidy(r"$\boxed{ 1 - \frac{1}{\mathrm{e}} }$.")
    '1 - \\frac{1}{e}'
    """
    text = last_boxed(text) or text
    text = text.strip().removesuffix(".").strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            text = text[len(left) : -len(right)].strip()
    wrapped = _WRAPPER.fullmatch(text)
    if wrapped and re.search(r"\d", wrapped[1]):  # "\text{12 apples}"
        text = wrapped[1].strip()
    text = text.replace(r"\varnothing", r"\emptyset")
    return _UPRIGHT.sub(r"\1", r"\emptyset" if _SPACE.sub("", text) == r"\{\}" else text)


def spelled_alike(answer: str) -> str:
    r"""Return an answer in the spelling that it shares with others plainly equal to it.

    A percentage, which is graded as equal to two numbers, is spelled as the fraction of one.

    >>> spelled_alike(r"$\frac{1}{2}$"), spelled_alike("0.50"), spelled_alike(r"\dfrac{x}{2} ")
    ('1/2', '1/2', '\\frac{x}{2}')
    >>> spelled_alike(r"50\%"), spelled_alike("(A)"), spelled_alike("A) both"), spelled_alike("A")
    ('1/2', 'A', 'A', 'A')
    """
    given = tidy(answer)
    if reading := read_number(given):
        return str(reading.values[-1])
    choice = _CHOICE_VOTED.fullmatch(_unwrapped(given))
    if choice and not _HEDGE.search(choice[3] or ""):
        return choice[1] or choice[2]
    return _words(given) if _is_words(given) else _plain(_unwrapped(given))


def compare_exactly(gold: str, given: str) -> Value:
    r"""Decide without symbolic mathematics; None if that is needed.

    >>> compare_exactly("1e6", "1,000,000"), compare_exactly("1e-7", "2e-7")
    (1.0, 0.0)
    >>> compare_exactly("(A)", "A) both"), compare_exactly("12:30", "12:45")
    (1.0, 0.0)
    >>> compare_exactly(r"\sqrt{2}", r"2^{1/2}") is None
    True
    """
    if _plain(gold) == _plain(given):
        return 1.0
    if _ELLIPSIS.search(gold):
        return ungraded("gold_ellipsis", f"the reference {gold!r:.80} has an ellipsis")
    if _ELLIPSIS.search(given):
        return refused("ellipsis", f"an ellipsis in {given!r:.80}")
    if _depth(given) > _MAX_DEPTH:
        return refused("too_deep", f"{_depth(given)} brackets deep: {given!r:.40}")
    found = _compare_texts(gold, given)
    if found is not None:
        return found
    if _are_side_by_side(gold):
        return ungraded("gold_unreadable", f"numbers side by side in the reference {gold!r:.80}")
    if _are_side_by_side(given):
        return refused("unreadable", f"numbers side by side in {given!r:.80}")
    return _compare_forms(gold, given)


def _are_side_by_side(text: str) -> bool:
    plain = _TWO_ARGUMENTS.sub("", text)
    return read_number(text) is None and _SIDE_BY_SIDE.search(plain) is not None


def _compare_forms(gold: str, given: str) -> float | None:
    """A set in braces is no point or interval in other brackets, whatever they hold."""
    braced = {_is_set(gold), _is_set(given)}
    if braced == {True, False} and (_is_bracketed(gold) or _is_bracketed(given)):
        return 0.0
    return None


def _is_set(text: str) -> bool:
    return text.startswith(r"\{") and text.endswith(r"\}")


def _is_bracketed(text: str) -> bool:
    plain = _SPACE.sub("", text)
    return plain[:1] in ("(", "[") and plain[-1:] in (")", "]") and "," in plain


def _compare_texts(gold: str, given: str) -> float | None:
    """Compare choices, clock times, words and plain numbers; None for anything else."""
    if choice := _CHOICE.fullmatch(_unwrapped(gold)):
        match = _CHOICE_GIVEN.fullmatch(_unwrapped(given))
        if match is None or _HEDGE.search(match[2] or ""):
            return 0.0
        return float(match[1].upper() == choice[1])
    if _TIME.fullmatch(_unwrapped(gold)) or _TIME.fullmatch(_unwrapped(given)):
        return float(_clock(gold) == _clock(given))
    left, right = read_number(_unworded(gold)), read_number(_unworded(given))
    if left and right:
        return _compare_numbers(left, right, gold, given)
    if _is_words(gold):
        return float(_words(gold) == _words(given))
    return _compare_bases(gold, given)


def _compare_numbers(left: Reading, right: Reading, gold: str, given: str) -> float:
    """Compare values; sizes of units count where both have a unit that is known."""
    agree = left.agrees(right)
    if agree is False:
        return 0.0
    scale = (left.size, right.size) if agree else (Fraction(1), Fraction(1))
    return float(
        any(
            _same(a * scale[0], b * scale[1], gold, given)
            for a in left.values
            for b in right.values
        )
    )


def _compare_bases(gold: str, given: str) -> float | None:
    """Compare numbers with a base; digits alone do where the other side names one."""
    left, right = based(gold), based(given)
    if left and right:
        return float(int(*left) == int(*right))
    digits = left or right
    other = (given if left else gold).strip().upper()
    if digits and re.fullmatch(r"[0-9A-Z]{1,60}", other):
        return float(digits[0].lstrip("0") == other.lstrip("0"))
    return None


def _unworded(text: str) -> str:
    """A number word without its wrapper; all else as it is, because a wrapper may hold a unit."""
    plain = _unwrapped(text)
    return plain if _WRAPPER.fullmatch(text.strip()) and plain.isalpha() else text


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "({[") - (char in ")}]")
        deepest = max(deepest, depth)
    return deepest


def spelled_as_ratio(text: str, other: str) -> str:
    """Return a number as a ratio where the grammar misreads it: 1e6 is 6 times e to it.

    Degrees become radians where the ``other`` side has a pi.
    """
    reading = read_number(text)
    if reading and reading.measure == "angle" and r"\pi" in other:
        turn = reading.values[0] / 180
        return f"\\frac{{{turn.numerator}\\pi}}{{{turn.denominator}}}"
    value = exact(text) if _NOTATION.search(text) else None
    return text if value is None else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _plain(text: str) -> str:
    text = re.sub(r"(?<=\d)\s+(?=\d)", "_", text)  # "1 1/2" is not "11/2"
    return _SPACE.sub("", text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac"))


def _unwrapped(text: str) -> str:
    return _WRAPPER.sub(r"\1", text).strip()


def _clock(text: str) -> str:
    return re.sub(r"[\s.]", "", _unwrapped(text)).lower().removeprefix("0")


def _is_words(text: str) -> bool:
    plain = _unwrapped(text)
    if _WORDS.fullmatch(plain) is None or _MATH_WORD.search(plain) is not None:
        return False
    wrapped = len(plain) > 1 and _WRAPPER.fullmatch(text.strip()) is not None
    return wrapped or plain.lower() in _SHORT_WORDS or _LONG_WORD.search(plain) is not None


def _words(text: str) -> str:
    return " ".join(_unwrapped(text).casefold().replace(".", "").split())


def _same(a: Fraction, b: Fraction, gold: str, given: str) -> bool:
    """True if equal, or one is the other's decimal expansion to at least six places."""
    if a == b:
        return True
    places = max(_places(gold), _places(given))
    terminates = all(_terminating(value) for value in (a, b))
    return places >= 6 and not terminates and abs(a - b) <= Fraction(1, 10**places)


def _places(text: str) -> int:
    match = re.search(r"\.(\d+)", text)
    return len(match[1]) if match else 0


def _terminating(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
