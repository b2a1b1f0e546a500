"""The answer checks of reasoning-gym's tasks, each run by the library's own scorer, in a worker.

Its scorers were written for honest answers: some raise on nonsense, some pay for it. So they run in
a process that can be killed, and an answer counts only if it earns more than nonsense does.
"""

from __future__ import annotations

import json
import pickle
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from gruppo.reward.base import GroupRows, Value, refused, ungraded
from gruppo.reward.extract import MAX_ANSWER, TEMPLATES, Answer, after_thinking, find_answer
from gruppo.types import Completion, Problem
from gruppo.worker.process import Death, Pool, Reply, Setup, pool

# Scorers take microseconds; processor time, so that load is not blamed.
_CPU_S: Final = 1.0
_MEMORY: Final = 4 * 2**30  # address space; an answer may be a program that fills it in a second

_LONGER: Final = 2  # times the entry's own answer, where that is long: another may be right too


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningGym:
    """What reasoning-gym's scorer gives the answer, for problems of a ``gym`` source.

    ``where`` says where the answer stands (as for ``exact``). Without ``partial`` only a full
    score counts, as 1; with it, shares between 0 and 1 do. An answer that scores no more than
    nonsense on the same entry gets 0: some tasks pay for any answer. One that makes the scorer
    raise, or takes a second of processor time or 4 GiB, scores the part's minimum; where the
    entry's own answer makes it raise too, or the scorer asks to exit, the row is unscored. An
    answer may have 2000 characters, or twice as many as the entry's own. Needs the extra ``gym``.
    Linux and macOS only.

    Some scorers evaluate the answer as an expression. On Linux the worker's system calls are
    filtered as in a box: it can read files and write none, and has no network and no processes; it
    could still forge its own score. On macOS nothing is filtered.

    Raises:
        ValueError: no workers.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["gym"] = "gym"
    where: Literal["all", "last", "answer_tag", "boxed", "hashes"] = "answer_tag"
    partial: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"gym.workers = {self.workers}: must be at least 1")

    def template(self) -> str:
        """A completion with ``{answer}`` where it is read."""
        return TEMPLATES[self.where]

    def open(self) -> None:
        """Start a worker.

        Raises:
            ValueError: reasoning-gym cannot be imported, or Linux runs on a machine whose system
                calls are not known.
        """
        started = self._pool().start()
        if isinstance(started, Death):
            raise ValueError(f"gym reward: {started.text}")

    def close(self) -> None:
        """End the worker processes."""
        self._pool().close()

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade one group."""
        return self.score_batch([(problem, completions)])[0]

    def score_batch(self, groups: Sequence[GroupRows]) -> list[list[Value]]:
        """Grade all groups: their answers go to the workers together."""
        prepared = [
            [self._prepare(problem, completion) for completion in completions]
            for problem, completions in groups
        ]
        sent = [entry for row in prepared for entry in row if isinstance(entry, bytes)]
        outcomes = iter(self._pool().map(sent, 10 * _CPU_S + 2.0) if sent else [])
        return [
            [self._verdict(next(outcomes)) if isinstance(entry, bytes) else entry for entry in row]
            for row in prepared
        ]

    def _prepare(self, problem: Problem, completion: Completion) -> Value | bytes:
        """What to ask the worker; or the value, where it is known without."""
        if "task" not in problem.info or "entry" not in problem.info:
            return ungraded("gold_missing", f"problem {problem.id!r} is of no gym source")
        answer = self._answer(completion.text, _longest(problem.info["entry"]))
        if answer.problem is not None:
            return refused(answer.problem, f"no {self.where} answer to read")
        known = {"task": problem.info["task"], "entry": problem.info["entry"]}
        return pickle.dumps({**known, "answer": answer.text})

    def _answer(self, text: str, most: int) -> Answer:
        if self.where != "all":
            return find_answer(text, self.where, most=most)
        whole = after_thinking(text).strip()
        return Answer(problem="oversize") if len(whole) > most else Answer(text=whole)

    def _verdict(self, outcome: Reply | Death) -> Value:
        if isinstance(outcome, Death):
            if outcome.code == -signal.SIGPROF:
                return refused("timeout", f"no score after {_CPU_S:g} s of processor time")
            return ungraded(outcome.kind, f"gym scorer: {outcome.text or outcome.code}")
        if not isinstance(outcome.value, dict):
            return ungraded(outcome.error_kind or "type", f"gym scorer: {outcome.error_text}")
        if "raised" in outcome.value:
            return refused("unreadable", f"the scorer raised {outcome.value['raised']}")
        value, nonsense = float(outcome.value["value"]), float(outcome.value["nonsense"])
        if not 0.0 <= value <= 1.0:
            return ungraded("range", f"gym scorer: {value} is not from 0 to 1")
        if value <= nonsense:
            return 0.0
        return value if self.partial else float(value >= 1.0)

    def _pool(self) -> Pool:
        settings = json.dumps({"cpu_s": _CPU_S, "memory_bytes": _MEMORY})
        return pool(
            Setup(handler="reward/child_gym.py", settings=settings, secrets=None), self.workers
        )


def _longest(entry: object) -> int:
    """Characters that an answer may have: the moves of a puzzle may be thousands."""
    own = entry.get("answer") if isinstance(entry, Mapping) else None
    return max(MAX_ANSWER, _LONGER * len(own) if isinstance(own, str) else 0)
