"""Wrong answers that look right: what a policy could say instead of the reference answer.

Numbers become near ones, texts the answers of other problems. None of them equals the reference
by exact value or by its words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

from gruppo.data.keyed import hash64
from gruppo.reward.extract import to_fraction

MOST_LISTED = 24
"""Answers in a list of candidates: a policy that tries them all will not try more."""


def same(left: str, right: str) -> bool:
    """Whether two answers are equal, by exact value if both are numbers.

    >>> same("1/2", "0.5"), same("Yes", " yes"), same("7", "8")
    (True, True, False)
    """
    a, b = to_fraction(left), to_fraction(right)
    if a is not None and b is not None:
        return a == b
    return " ".join(left.split()).casefold() == " ".join(right.split()).casefold()


def others(gold: str, golds: Sequence[str], key: object) -> list[str]:
    """The answers of other problems, each once, in an order that depends on ``key`` alone."""
    found: dict[str, str] = {}
    for answer in golds:
        if not same(answer, gold):
            found.setdefault(answer.strip().casefold(), answer)
    ordered = sorted(found.values(), key=lambda answer: hash64("lab", str(key), answer))
    return ordered[: MOST_LISTED - 1]


def wrong_answers(gold: str, elsewhere: Sequence[str]) -> dict[str, str]:
    """Wrong answers by what is wrong with them.

    >>> wrong_answers("72", ["15"])["a tenth more"], wrong_answers("72", [])["its digits apart"]
    ('79', '7 or 2')
    """
    made = dict(_near(gold))
    made |= {f"of another problem, {n}": text for n, text in enumerate(elsewhere[:2], start=1)}
    if not made:
        made["its letters the other way round"] = gold[::-1] if len(set(gold)) > 1 else gold + "x"
    return {what: text for what, text in made.items() if text and not same(text, gold)}


def among(gold: str, elsewhere: Sequence[str]) -> list[str]:
    """The reference in the middle of other answers: never the first, never the last.

    >>> among("5", ["1", "2", "3"]), among("yes", ["no"])
    (['1', '5', '2', '3'], ['no', 'yes', 'no'])
    """
    listed = list(elsewhere) or [gold + gold]
    listed = listed if len(listed) > 1 else listed * 2
    middle = len(listed) // 2 if len(listed) % 2 == 0 and len(listed) > 2 else 1
    return [*listed[:middle], gold, *listed[middle:]]


def _near(gold: str) -> Iterable[tuple[str, str]]:
    value = to_fraction(gold)
    if value is None:
        return
    step = 1 if value >= 0 else -1
    tenth = value * Fraction(11, 10)
    if value.denominator == 1:
        tenth = Fraction(round(tenth)) if round(tenth) != value else value + step
    yield "the next number", _written(value + 1)
    yield "a tenth more", _written(tenth)
    yield "ten times as much", _written(value * 10)
    yield "the other sign", _written(-value)
    yield "one digit more before it", f"1{gold}" if gold[:1].isdigit() else ""
    yield "one digit more after it", f"{gold}0" if "/" not in gold and "." not in gold else ""
    if len(gold) > 1 and gold.isdigit():
        yield "its digits apart", " or ".join(gold)
        yield "its digits the other way round", gold[::-1]
        yield "its first digit", gold[0]


def _written(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
