"""Rewards from a server of one's own, by OpenRLHF's contract for remote rewards.

One POST per group: ``{"query": [...], "prompts": [...], "labels": [...]}``, where a query is the
prompt's text followed by the completion's. The answer is ``{"rewards": [...]}``, one number each;
``scores``, if given, are the task metric (and stand for the rewards where those are missing).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gruppo.reward.base import GroupRows, Value, ungraded
from gruppo.reward.service import Lost, Service, client, describe_lost
from gruppo.types import Completion, Problem, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """The numbers that the service at ``service.url`` gives (OpenRLHF's remote reward).

    A group whose request fails, or is answered by anything but one number (or null) per row, is
    unscored, with the reason.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["remote"] = "remote"
    service: Service

    def open(self) -> None:
        """Find a missing key now. Raises ValueError."""
        self.service.key()

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade one group."""
        return self.score_batch([(problem, completions)])[0]

    def score_batch(self, groups: Sequence[GroupRows]) -> list[list[Value]]:
        """Grade all groups, several requests at a time."""
        bodies = [_body(problem, completions) for problem, completions in groups]
        answers = client(self.service).post_all("", bodies)
        return [
            self._values(answer, len(completions))
            for answer, (_, completions) in zip(answers, groups, strict=True)
        ]

    def _values(self, answer: bytes | Lost, num_rows: int) -> list[Value]:
        if isinstance(answer, Lost):
            return [ungraded(**describe_lost(answer, self.service))] * num_rows
        try:
            return list(_read(answer, num_rows))
        except (ValueError, RecursionError, OverflowError) as error:
            text = f"{self.service.url}: {type(error).__name__}: {error}"
            return [ungraded("service_answer", text)] * num_rows


def _body(problem: Problem, completions: Sequence[Completion]) -> bytes:
    prompt = "\n".join(message.content for message in problem.prompt)
    rows = len(completions)
    return json.dumps(
        {
            "query": [prompt + completion.text for completion in completions],
            "prompts": [prompt] * rows,
            "labels": [problem.answer] * rows,
        }
    ).encode()


def _read(answer: bytes, num_rows: int) -> list[Value]:
    data = json.loads(answer)
    if not isinstance(data, dict) or not ({"rewards", "scores"} & data.keys()):
        raise ValueError('the answer is no JSON object with "rewards" or "scores"')
    tasks = _numbers(data.get("scores", data.get("rewards")), "scores", num_rows)
    totals = _numbers(data.get("rewards", data.get("scores")), "rewards", num_rows)
    return [
        None if total is None else Score(total=total, task=task)
        for total, task in zip(totals, tasks, strict=True)
    ]


def _numbers(column: Any, name: str, num_rows: int) -> list[float | None]:
    if not isinstance(column, list) or len(column) != num_rows:
        raise ValueError(f"{name} is no list of {num_rows} numbers")
    for value in column:
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{name} holds {value!r:.80}, which is no number")
    return [None if value is None else float(value) for value in column]
