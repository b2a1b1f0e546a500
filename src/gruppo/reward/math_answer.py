r"""The math reward: symbolic equality of a final answer and the reference, safely.

Easy cases are decided here, exactly (numbers as fractions, words, choices, clock times); the rest
goes to math-verify in worker processes with hard limits (``child_math.py``). Only the one place
named by ``where`` is read, after ``</think>``: a number somewhere in the text is no answer.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from gruppo.reward.answer import no_gold
from gruppo.reward.base import GroupRows, Value, refused, ungraded
from gruppo.reward.extract import TEMPLATES, find_answer, last_boxed
from gruppo.reward.math_text import compare_exactly, spelled_as_ratio, tidy
from gruppo.types import Completion, Problem
from gruppo.worker.process import Death, Pool, Reply, Setup, pool

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
            verdicts.append(
                _Pair(spelled_as_ratio(gold, given), spelled_as_ratio(given, gold))
                if verdict is None
                else verdict
            )
        return verdicts

    def _pool(self) -> Pool:
        settings = {
            "cpu_s": self.cpu_s,
            "wall_s": 10 * self.cpu_s,
            "memory_bytes": int(self.memory_gib * 2**30),
        }
        setup = Setup(handler="reward/child_math.py", settings=json.dumps(settings), secrets=None)
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
