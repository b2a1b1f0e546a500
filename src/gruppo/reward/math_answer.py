r"""The math reward: symbolic equality of a final answer and the reference, safely.

Easy cases are decided here, exactly (numbers as fractions, words, choices, clock times); the rest
goes to math-verify in worker processes with hard limits (``child_math.py``). Only the one place
named by ``where`` is read, after ``</think>``: a number somewhere in the text is no answer.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar, Literal

from gruppo.reward.answer import no_gold
from gruppo.reward.base import GroupRows, Value, refused, ungraded
from gruppo.reward.extract import TEMPLATES, find_answer, last_boxed, to_fraction
from gruppo.reward.process import Death, Pool, Reply, Setup, pool
from gruppo.types import Completion, Problem

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
_UNIT = re.compile(r"\s*(?:\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\^\s*\{?\\circ\}?|\\degree)\s*$")
_WRAPPER = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit)\s*\{([^{}]*)\}")
_UPRIGHT = re.compile(r"\\(?:mathrm|text|operatorname)\s*\{\s*([ei])\s*\}")
_SPACE = re.compile(r"\\[,;:! ]|~|\\quad|\\left|\\right|\s+")

# No sane answer nests deeper; the grammar takes exponential time on those that do.
_MAX_DEPTH = 24

_LIMIT_SIGNALS = frozenset({-signal.SIGPROF, -signal.SIGALRM, -signal.SIGXCPU})
_CRASH_SIGNALS = frozenset(
    -number
    for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Math:
    r"""1 if the answer equals the reference mathematically, else 0 (math-verify's rules).

    Equal are ``\frac{1}{2}`` and ``0.5``, ``(x+1)^2`` and ``x^2+2x+1``, ``50\%`` and ``0.5`` or
    ``50``, an answer with or without its unit, ``1/3`` and ``0.333333`` (six digits or more).
    Numbers are compared exactly or to a relative 1e-5, never to an absolute tolerance.

    An answer that uses more than ``cpu_s`` seconds of processor time (or ten times that on the
    clock), more than ``memory_gib``, or that cannot be read, scores the part's minimum: leaving it
    unscored would reward it. A checker that dies by itself is tried again once, then its row is
    unscored. Lists with an ellipsis are compared as text; other answers to them are unscored.

    ``where`` the answer stands: in the last ``\boxed``, in answer tags or after ``####``.
    ``workers`` processes are started when the first answer needs them. Linux and macOS only.

    Raises:
        ValueError: a limit that is not positive.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["math"] = "math"
    where: Literal["boxed", "answer_tag", "hashes"] = "boxed"
    workers: int = 2
    cpu_s: float = 1.0
    memory_gib: float = 3.0

    def __post_init__(self) -> None:
        for name, value in (
            ("workers", self.workers),
            ("cpu_s", self.cpu_s),
            ("memory_gib", self.memory_gib),
        ):
            if not value > 0:
                raise ValueError(f"math.{name} = {value}: it must be positive")

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade one group."""
        return self.score_batch([(problem, completions)])[0]

    def score_batch(self, groups: Sequence[GroupRows]) -> list[list[Value]]:
        """Grade all groups: the undecided answers of all of them go to the workers together."""
        decided: list[list[Value | _Pair]] = [self._decide(*group) for group in groups]
        pairs = list(dict.fromkeys(v for row in decided for v in row if isinstance(v, _Pair)))
        verdicts = dict(zip(pairs, self._ask(pairs), strict=True))
        return [[verdicts[v] if isinstance(v, _Pair) else v for v in row] for row in decided]

    def template(self) -> str:
        """A completion with ``{answer}`` where the answer is read."""
        return TEMPLATES[self.where]

    def close(self) -> None:
        """End the worker processes."""
        self._pool().close()

    def _decide(self, problem: Problem, completions: Sequence[Completion]) -> list[Value | _Pair]:
        """Grade what needs no worker."""
        gold = reference(problem)
        if not gold:
            return list(no_gold(problem, "a mathematical answer", len(completions)))
        verdicts: list[Value | _Pair] = []
        for completion in completions:
            answer = find_answer(completion.text, self.where)
            if answer.problem is not None:
                verdicts.append(refused(answer.problem, f"no {self.where} answer to read"))
                continue
            given = tidy(answer.text)
            verdict = compare_exactly(gold, given)
            verdicts.append(_Pair(_spelled(gold), _spelled(given)) if verdict is None else verdict)
        return verdicts

    def _pool(self) -> Pool:
        settings = {
            "cpu_s": self.cpu_s,
            "wall_s": 10 * self.cpu_s,
            "memory_bytes": int(self.memory_gib * 2**30),
        }
        setup = Setup(
            handler="child_math.py", settings=json.dumps(settings), inherit_environment=False
        )
        return pool(setup, self.workers)

    def _ask(self, pairs: Sequence[_Pair]) -> list[Value]:
        """Let the workers compare; a checker that died is given a second chance."""
        if not pairs:
            return []
        payloads = [json.dumps({"gold": p.gold, "answer": p.answer}).encode() for p in pairs]
        workers, seconds = self._pool(), 10 * self.cpu_s + 2.0
        outcomes = workers.map(payloads, seconds)
        again = [i for i, outcome in enumerate(outcomes) if _is_death(outcome)]
        first = {i: outcomes[i] for i in again}
        if again:
            retried = workers.map([payloads[i] for i in again], seconds)
            for i, outcome in zip(again, retried, strict=True):
                outcomes[i] = outcome
        return [
            _verdict(pair, outcome, first.get(i))
            for i, (pair, outcome) in enumerate(zip(pairs, outcomes, strict=True))
        ]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two answers that only the workers can compare."""

    gold: str
    answer: str


def reference(problem: Problem) -> str:
    r"""Return the reference answer: after ``####`` or inside the last ``\boxed{}``, if there."""
    text = (problem.answer or "").rpartition("####")[2]
    return tidy(last_boxed(text) or text)


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
    return _UPRIGHT.sub(r"\1", text)


def spelled_alike(answer: str) -> str:
    r"""Return an answer in the spelling that it shares with others plainly equal to it.

    A percentage, which is graded as equal to two numbers, is spelled as the fraction of one.

    >>> spelled_alike(r"$\frac{1}{2}$"), spelled_alike("0.50"), spelled_alike(r"\dfrac{x}{2} ")
    ('1/2', '1/2', '\\frac{x}{2}')
    >>> spelled_alike(r"50\%"), spelled_alike("(A)"), spelled_alike("A) both"), spelled_alike("A")
    ('1/2', 'A', 'A', 'A')
    """
    given = tidy(answer)
    if readings := _readings(given):
        return str(readings[-1])
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
    return _compare_texts(gold, given)


def _compare_texts(gold: str, given: str) -> float | None:
    """Compare choices, clock times, words and plain numbers; None for anything else."""
    if choice := _CHOICE.fullmatch(_unwrapped(gold)):
        match = _CHOICE_GIVEN.fullmatch(_unwrapped(given))
        if match is None or _HEDGE.search(match[2] or ""):
            return 0.0
        return float(match[1].upper() == choice[1])
    if _TIME.fullmatch(_unwrapped(gold)) or _TIME.fullmatch(_unwrapped(given)):
        return float(_clock(gold) == _clock(given))
    if _is_words(gold):
        return float(_words(gold) == _words(given))
    left, right = _readings(gold), _readings(given)
    if left and right:
        return float(any(_same(a, b, gold, given) for a in left for b in right))
    return None


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "({[") - (char in ")}]")
        deepest = max(deepest, depth)
    return deepest


def _spelled(text: str) -> str:
    """Return a number in scientific notation as a ratio: the grammar reads 1e6 as 6 times e."""
    value = to_fraction(text) if re.search(r"\d\.?[eE]", text) else None
    return text if value is None else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _plain(text: str) -> str:
    return _SPACE.sub("", text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac"))


def _unwrapped(text: str) -> str:
    return _WRAPPER.sub(r"\1", text).strip()


def _clock(text: str) -> str:
    return re.sub(r"[\s.]", "", _unwrapped(text)).lower().removeprefix("0")


def _is_words(text: str) -> bool:
    plain = _unwrapped(text)
    return (
        _WORDS.fullmatch(plain) is not None
        and _LONG_WORD.search(plain) is not None
        and _MATH_WORD.search(plain) is None
    )


def _words(text: str) -> str:
    return " ".join(_unwrapped(text).casefold().replace(".", "").split())


@lru_cache(maxsize=65536)
def _readings(text: str) -> tuple[Fraction, ...]:
    r"""Return the numbers that a plain number stands for: two for a percentage, none if it is not.

    A unit in ``\text{}`` or a degree sign after the number is ignored.
    """
    plain = _UNIT.sub("", text).strip()
    percent = re.sub(r"\\?%$", "", plain).strip()
    value = to_fraction(percent)
    if value is None:
        return ()
    return (value,) if percent == plain else (value, value / 100)


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


def _is_death(outcome: Reply | Death) -> bool:
    """True for a death that is not a limit: the only kind worth a second try."""
    return isinstance(outcome, Death) and (
        outcome.kind == "protocol"
        or (outcome.kind == "died" and outcome.code not in _LIMIT_SIGNALS)
    )


def _verdict(pair: _Pair, outcome: Reply | Death, first: Reply | Death | None) -> Value:
    """Turn what a worker said, or how it ended, into a value."""
    about = f"answer {pair.answer!r:.80}"
    if isinstance(outcome, Death):
        if outcome.kind == "timeout" or outcome.code in _LIMIT_SIGNALS:
            return refused("timeout", f"checking took too long: {about}")
        codes = {outcome.code, first.code if isinstance(first, Death) else None}
        if codes <= _CRASH_SIGNALS:
            return refused("crash", f"the checker crashed twice ({outcome.code}): {about}")
        return ungraded(f"checker_{outcome.kind}", f"{outcome.text or outcome.code}: {about}")
    if outcome.error_kind is not None:
        return refused(outcome.error_kind, f"{outcome.error_text}: {about}")
    assert isinstance(outcome.value, dict), "child_math.py replies with an object"
    if "gold" in outcome.value:
        why = outcome.value["gold"]
        return ungraded("gold_unreadable", f"reference {pair.gold!r:.80}: {why}")
    if "answer" in outcome.value:
        return refused("unreadable", f"{about}: {outcome.value['answer']}")
    return float(outcome.value["equal"])
