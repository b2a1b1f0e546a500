r"""Which answer a completion votes for: its final answer, in one spelling for all equal ones.

The spelling is coarser than text and finer than the rewards' own equality (``0.5``, ``1/2`` and,
for mathematics, ``50\%`` are one vote, ``(A)`` and ``A`` are one, ``x + 1`` and ``1 + x`` are two).
Whether an answer is right is not asked here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from gruppo.reward import Countdown, Exact, Math, Number, RewardSet
from gruppo.reward.extract import Where, after_thinking, find_answer, one_number
from gruppo.reward.math_text import spelled_alike
from gruppo.types import Score

Ballot = Callable[[str], str | None]


def ballot(reward: object) -> Ballot | None:
    """How to read the vote off the text of a completion that ``reward`` grades.

    None for rewards that grade something else than an answer (functions, layouts), or do not say
    which words of the text are the answer (``Regex``: a text with its thinking is like no other).
    A vote is None where the text has no answer.

    >>> read = ballot(Number(where="last"))
    >>> read("so 1/2"), read("or 0.50"), read("no idea")
    ('1/2', '1/2', None)
    """
    match reward:
        case Number(where=where):
            return lambda text: _number(find_answer(text, where).text)
        case Math(where=where):
            return lambda text: spelled_alike(find_answer(text, where).text) or None
        case Exact(where=where, ignore_case=fold):
            return lambda text: _collapsed(_text(text, where), fold=fold)
        case Countdown(where=where):
            return lambda text: "".join(_text(text, where).split()) or None
        case _:
            return None


def ballot_of(scores: Sequence[Score], reward: RewardSet) -> Ballot | None:
    """How votes on a problem are read: as its task reward reads answers.

    With several task rewards, that is the first which gave one of the completions a value.
    """
    names = reward.task_names
    graded_by = (n for n in names if any(s.parts.get(n) is not None for s in scores))
    name = next(graded_by, names[0])
    return next(ballot(part.reward) for part in reward.parts if part.name == name)


def _text(text: str, where: Literal["all"] | Where) -> str:
    return after_thinking(text) if where == "all" else find_answer(text, where).text


def _number(answer: str) -> str | None:
    number = one_number(answer)
    return None if number is None else str(number)


def _collapsed(text: str, *, fold: bool = False) -> str | None:
    joined = " ".join(text.split())
    return (joined.casefold() if fold else joined) or None
