r"""The exact number, or numbers, that a short answer stands for, and the unit it is given in.

Mixed numbers, recurring decimals, powers of ten, percentages, numbers with a base, number words,
and units of length, mass, time, money and angle. All arithmetic is that of fractions; nothing is
evaluated. What is no such number is left to symbolic mathematics (``child_math.py``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Final

from gruppo.reward.extract import to_fraction

_WRAPPED_UNIT = re.compile(
    r"(?:\\[,;: ]|~|\s)*\\(?:text|mathrm|mbox)\s*\{(?P<name>[^{}]*)\}"
    r"\s*(?:\^\s*\{?(?P<power>[23])\}?)?$"
)
_PLAIN_UNIT = re.compile(
    r"(?<=\d)\s*(?P<name>[A-Za-z]{2,8}|°)\.?\s*(?:\^\s*\{?(?P<power>[23])\}?)?$"
)
_DEGREES = re.compile(r"(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree)$")
_MIXED = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<whole>\d{1,40})"
    r"(?:\s*\\[dt]?frac\s*(?:\{\s*(?P<a>\d{1,40})\s*\}|(?P<c>\d))\s*(?:\{\s*(?P<b>\d{1,40})\s*\}|(?P<d>\d))"
    r"|\s+(?P<e>\d{1,40})\s*/\s*(?P<f>\d{1,40}))"
)
_RECURRING = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>\d{0,40})\.(?P<fixed>\d{0,40})"
    r"(?:\\overline\s*\{(?P<bar>\d{1,40})\}|\\dot\s*\{?(?P<dot>\d)\}?|\((?P<round>\d{1,40})\))"
)
_POWER = re.compile(
    r"(?P<number>[-+]?[\d.,]{1,40})\s*(?:\\times|\\cdot|×|·|\*)\s*"
    r"10\s*\^\s*(?:\{\s*(?P<braced>[-+]?\d{1,3})\s*\}|(?P<digit>\d))"
)
_BASED = re.compile(
    r"(?P<digits>[0-9A-Za-z]{1,60})_(?:\{\s*(?P<braced>\d{1,2})\s*\}|(?P<digit>\d))"
)
_SPACED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_MINUS = str.maketrans({"−": "-", "\u2013": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " "})

_NAMES: Final = "zero one two three four five six seven eight nine ten eleven twelve"
_WORDS: Final = {word: Fraction(value) for value, word in enumerate(_NAMES.split())}


def _units() -> dict[str, tuple[str, Fraction]]:
    """Unit names with what they measure and their size."""
    rows = {
        "length": "mm millimeter millimetre=1/1000 cm centimeter centimetre=1/100 m meter metre=1 "
        "km kilometer kilometre=1000",
        "mass": "mg milligram=1/1000000 g gram=1/1000 kg kilogram=1",
        "time": "s sec second=1 min minute=60 h hr hour=3600 day=86400 week=604800",
        "money": "cent=1/100 dollar=1",
        "angle": "° deg degree=1",
        "customary length": "inch inches=1/12 ft foot feet=1 yd yard=3 mi mile=5280",
        "customary mass": "oz ounce=1/16 lb pound=1",
    }
    found: dict[str, tuple[str, Fraction]] = {}
    for measure, text in rows.items():
        names: list[str] = []
        for entry in text.split():
            name, equals, size = entry.partition("=")
            names.append(name)
            if equals:
                for known in names:
                    found[known] = found[known + "s"] = (measure, Fraction(size))
                names = []
    return found


_UNITS: Final = _units()


@dataclass(frozen=True, slots=True)
class Reading:
    """The values a plain number may have (two for a percentage), and its unit's measure and size.

    ``measure`` is None without a unit, "" with one that is not known here.
    """

    values: tuple[Fraction, ...]
    measure: str | None = None
    size: Fraction = Fraction(1)

    def agrees(self, other: Reading) -> bool | None:
        """Whether units let the two be equal: None if they say nothing (one has none)."""
        if not (self.measure and other.measure):
            return None
        return self.measure == other.measure


@lru_cache(maxsize=65536)
def read_number(text: str) -> Reading | None:
    r"""Read a plain number, None if it is none.

    >>> read_number(r"1\frac{1}{2}").values, read_number("1 1/2").values
    ((Fraction(3, 2),), (Fraction(3, 2),))
    >>> read_number(r"0.1\overline{6}").values, read_number(r"6.02\times 10^{2}").values
    ((Fraction(1, 6),), (Fraction(602, 1),))
    >>> read_number(r"50\%").values, read_number(r"5\text{ cm}").measure
    ((Fraction(50, 1), Fraction(1, 2)), 'length')
    >>> read_number("x+1"), read_number("1 2")
    (None, None)
    """
    text = text.translate(_MINUS).strip()
    if text.lower() in _WORDS:
        return Reading((_WORDS[text.lower()],))
    body, measure, size = _without_unit(text)
    percent = re.sub(r"\\?%$", "", body).strip()
    value = exact(percent)
    if value is None:
        return None
    values = (value,) if percent == body else (value, value / 100)
    return Reading(values, measure, size)


def _without_unit(text: str) -> tuple[str, str | None, Fraction]:
    """The text before a unit, what the unit measures, and its size."""
    if text.startswith(r"\$"):
        return text[2:].strip(), *_UNITS["dollar"]
    if degrees := _DEGREES.search(text):
        return text[: degrees.start()].strip(), *_UNITS["degree"]
    for pattern in (_WRAPPED_UNIT, _PLAIN_UNIT):
        if match := pattern.search(text):
            name, power = match["name"].strip().rstrip("."), int(match["power"] or 1)
            known = _UNITS.get(name) or _UNITS.get(name.lower())
            if known is None and pattern is _PLAIN_UNIT:
                break
            measure, size = known or ("", Fraction(1))
            dimension = f"{measure}^{power}" if measure and power > 1 else measure
            return text[: match.start()].strip(), dimension, size**power
    return text, None, Fraction(1)


def exact(text: str) -> Fraction | None:
    """The value of one number in any of the notations above, without unit or percent sign."""
    value = to_fraction(text)
    if value is not None:
        return value
    if _SPACED.fullmatch(text):
        return to_fraction(text.replace(" ", ""))
    for pattern, convert in ((_MIXED, _mixed), (_RECURRING, _recurring), (_POWER, _power)):
        if match := pattern.fullmatch(text):
            return convert(match)
    return None


def _mixed(match: re.Match[str]) -> Fraction | None:
    top = int(match["a"] or match["c"] or match["e"])
    bottom = int(match["b"] or match["d"] or match["f"])
    if bottom == 0 or (match["e"] and top >= bottom):  # "1 11/2" is no mixed number
        return None
    value = int(match["whole"]) + Fraction(top, bottom)
    return -value if match["sign"] == "-" else value


def _recurring(match: re.Match[str]) -> Fraction:
    fixed, period = match["fixed"], match["bar"] or match["dot"] or match["round"]
    shift, nines = 10 ** len(fixed), 10 ** len(period) - 1
    value = Fraction(int((match["whole"] or "0") + fixed), shift) + Fraction(
        int(period), shift * nines
    )
    return -value if match["sign"] == "-" else value


def _power(match: re.Match[str]) -> Fraction | None:
    number = to_fraction(match["number"])
    exponent = int(match["braced"] or match["digit"])
    return None if number is None else number * Fraction(10) ** exponent


def based(text: str) -> tuple[str, int] | None:
    r"""Digits and base of a number with a base, such as ``12_8`` or ``1A_{16}``.

    >>> based("12_8"), based(r"1A_{16}"), based("x_1"), based("19_8")
    (('12', 8), ('1A', 16), None, None)
    """
    match = _BASED.fullmatch(text.strip())
    if match is None:
        return None
    digits, base = match["digits"].upper(), int(match["braced"] or match["digit"])
    if not 2 <= base <= 36 or not digits[0].isdigit():
        return None
    return (digits, base) if all(int(digit, 36) < base for digit in digits) else None
