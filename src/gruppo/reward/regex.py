"""A reward by regular expression, matched in a worker process that can be killed.

The recipe's author writes the pattern, the policy writes the text: a pattern with nested repeats
can take exponential time on a hostile text, and ``re`` cannot be interrupted from within.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from gruppo.reward.answer import gold_text, no_gold
from gruppo.reward.base import GroupRows, Value, refused, ungraded
from gruppo.reward.extract import MAX_ANSWER
from gruppo.types import Completion, Problem, Score
from gruppo.worker.process import Death, Pool, Reply, Setup, pool

# A sane pattern takes milliseconds on a completion; processor time, so that load is not blamed.
_CPU_S: Final = 1.0
# A pattern that hangs on every text would hold a step for minutes; then the rest is not tried.
_MAX_DEATHS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Regex:
    """1 if ``pattern`` matches the completion, else 0.

    ``full`` asks for a match of the whole text, ``ignore_case`` takes capitals for small letters.
    ``{answer}`` in the pattern stands for the problem's reference answer, taken literally. A match
    that takes more than a second of processor time is given up, and after eight of these the other
    texts of the call are not tried. Such completions score the part's minimum if the pattern came
    to an end on another one of the call: the policy wrote their texts, and must not gain by it.
    If it ended on none, the pattern is to blame, and they are unscored. Linux and macOS only.

    Raises:
        ValueError: the pattern is no regular expression.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["regex"] = "regex"
    pattern: str
    full: bool = False
    ignore_case: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern.replace("{answer}", "x"))
        except re.error as error:
            raise ValueError(f"regex reward: pattern {self.pattern!r}: {error}") from error

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade one group."""
        return self.score_batch([(problem, completions)])[0]

    def score_batch(self, groups: Sequence[GroupRows]) -> list[list[Value]]:
        """Grade all groups: their texts go to the worker together."""
        sent = [
            self._request(problem, completion)
            for problem, completions in groups
            for completion in completions
            if not self._lacks_answer(problem)
        ]
        verdicts = iter(self._match(sent))
        return [
            no_gold(problem, "a short text", len(completions))
            if self._lacks_answer(problem)
            else [next(verdicts) for _ in completions]
            for problem, completions in groups
        ]

    def close(self) -> None:
        """End the worker process."""
        self._pool().close()

    def _lacks_answer(self, problem: Problem) -> bool:
        gold = gold_text(problem)
        return "{answer}" in self.pattern and (not gold or len(gold) > MAX_ANSWER)

    def _request(self, problem: Problem, completion: Completion) -> bytes:
        pattern = self.pattern.replace("{answer}", re.escape(gold_text(problem) or ""))
        return json.dumps({"pattern": pattern, "text": completion.text}).encode()

    def _match(self, requests: Sequence[bytes]) -> list[Value]:
        if not requests:
            return []
        outcomes = self._pool().map(requests, 10 * _CPU_S + 2.0, max_deaths=_MAX_DEATHS)
        ended = any(isinstance(o, Reply) and isinstance(o.value, bool) for o in outcomes)
        return [self._verdict(outcome, late=refused if ended else ungraded) for outcome in outcomes]

    def _verdict(self, outcome: Reply | Death, *, late: Callable[[str, str], Score]) -> Value:
        about = f"pattern {self.pattern!r:.80}"
        if isinstance(outcome, Death):
            if outcome.kind == "timeout" or outcome.code == -signal.SIGPROF:
                why = outcome.text or f"no result after {_CPU_S:g} s of processor time"
                return late("timeout", f"{about}: {why}; write it without nested repeats")
            return ungraded(outcome.kind, f"{about}: {outcome.text or outcome.code}")
        if not isinstance(outcome.value, bool):
            return ungraded(outcome.error_kind or "type", f"{about}: {outcome.error_text}")
        return float(outcome.value)

    def _pool(self) -> Pool:
        flags = re.DOTALL | (re.IGNORECASE if self.ignore_case else 0)
        settings = {"full": self.full, "flags": int(flags), "cpu_s": _CPU_S}
        setup = Setup(handler="reward/child_regex.py", settings=json.dumps(settings), secrets=None)
        return pool(setup, 1)
