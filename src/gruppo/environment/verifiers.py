"""Environments of the ``verifiers`` library (0.4): its tools, its users, its rewards.

They run in worker processes, one process an episode; the policy's turns are drawn here, token by
token. What the library does beside the conversation stands in ``gruppo.worker.verifiers``, as does
what is refused. Problems are of data kind ``verifiers`` with ``episodes``, the reward is of kind
``environment``.
"""

from __future__ import annotations

import atexit
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, final

from gruppo.environment.base import Reply
from gruppo.environment.calls import BadCall, Call, CallFormat, find_calls
from gruppo.environment.tools import (
    MAX_CALLS,
    check_result_size,
    instructions_of,
    told,
)
from gruppo.errors import ServiceError
from gruppo.types import Message, Problem
from gruppo.worker.process import Death, Setup, Worker

_GRACE_S: Final = 5.0  # of a worker, after the deadline of the episode that it asks
_ROLES: Final = frozenset({"system", "user", "tool"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifiers:
    """The environment of task set ``taskset``, or the one that ``settings`` names by its ``id``.

    ``options`` are the task set's settings as in the data, ``settings`` the environment's own.
    ``calls`` is how calls are written ("hermes", "llama" or "fenced": what the chat template
    shows), ``max_result`` the most characters of a result. An answer may take ``timeout_s``
    (scoring too), then its episode is killed. Of the variables whose names say that they are
    secret the processes see those in ``secrets`` (a judge's key, say).
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["verifiers"] = "verifiers"
    taskset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    calls: CallFormat = "hermes"
    max_result: int = 2000
    timeout_s: float = 20.0
    secrets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_result_size(self.max_result)
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s = {self.timeout_s}: must be positive")

    def check(self, max_seconds: float, workers: int) -> None:
        """Refuse what would have sound episodes time out. Raises ValueError.

        That is a deadline before the episode's own, and several episodes asked at once: those of a
        process are answered one after the other.
        """
        if workers > 1:
            raise ValueError(
                f"environment.workers = {workers}: episodes of verifiers are answered one after "
                "the other, and one that hangs would take the time of its neighbours: use 1"
            )
        if self.timeout_s + _GRACE_S > max_seconds:
            raise ValueError(
                f"environment.max_seconds = {max_seconds:g}: must be at least {_GRACE_S:g} more "
                f"than use.timeout_s = {self.timeout_s:g}, within which an episode answers"
            )

    def open(self) -> VerifiersEnvironment:
        """Start a worker.

        Raises:
            ValueError: verifiers is missing, or the environment cannot be made or be played here.
        """
        host = _Host(self)
        if host.refusal:
            raise ValueError(
                f"environment verifiers: {self.taskset!r}: {host.refusal} (the library: "
                'pip install "gruppo[verifiers]")'
            )
        return VerifiersEnvironment(about=self, tools=host.tools, free=[host])

    def worker_setup(self) -> Setup:
        """What the worker processes run."""
        settings = {
            "taskset": self.taskset,
            "options": dict(self.options),
            "settings": dict(self.settings),
            "max_result": self.max_result,
            "timeout_s": self.timeout_s,
        }
        handler = "worker/verifiers/child.py"
        return Setup(handler=handler, settings=json.dumps(settings), secrets=self.secrets)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiersEnvironment:
    """An environment that is open. ``free`` are the workers that start no episode just now."""

    about: Verifiers
    tools: tuple[Mapping[str, object], ...]
    free: list[_Host] = field(repr=False, compare=False)

    @property
    def calls(self) -> CallFormat:
        """How calls are written."""
        return self.about.calls

    @property
    def instructions(self) -> str:
        """The tools in words; none without tools."""
        return instructions_of(self.tools, self.about.calls) if self.tools else ""

    def prompt(self, problem: Problem) -> tuple[Message, ...]:
        """The problem's own prompt, which the environment must open with."""
        return problem.prompt

    def start(self, problem: Problem) -> VerifiersEpisode:
        """Begin an episode in a process of its own.

        Raises:
            ValueError: the problem is of no task set, or of another.
            ServiceError: the environment failed before the first turn.
        """
        given = problem.info.get("verifiers")
        mine = {"taskset": self.about.taskset, "options": dict(self.about.options)}
        if not isinstance(given, Mapping) or {k: given.get(k) for k in mine} != mine:
            raise ValueError(
                f"problem {problem.id!r} is not of task set {self.about.taskset!r} with these "
                "options: give data of kind verifiers the same taskset and options, and episodes"
            )
        prompt = [{"role": m.role, "content": m.content} for m in problem.prompt]
        host = self._take()
        try:
            began = host.ask({"do": "start", "data": given["data"], "prompt": prompt})
        finally:
            if host.alive:
                self.free.append(host)
        return VerifiersEpisode(self.about, bool(self.tools), host, began)

    def close(self) -> None:
        """End the worker processes that start no episode just now."""
        while self.free:
            self.free.pop().close()

    def _take(self) -> _Host:
        """A worker: as many as start episodes at once."""
        while True:
            try:  # episodes are started in several threads
                host = self.free.pop()
            except IndexError:
                host = _Host(self.about)
                if host.refusal:
                    raise ServiceError(f"verifiers: {host.refusal}") from None
            if host.alive:
                return host
            host.close()


@final
class VerifiersEpisode:
    """One episode; its process has reached the policy's first turn."""

    def __init__(
        self, about: Verifiers, has_tools: bool, host: _Host, began: Mapping[str, Any]
    ) -> None:
        self._about = about
        self._has_tools = has_tools
        self._host = host
        self._number = began["episode"]
        self._over = "reward" in began

    def reply(self, text: str, tokens: tuple[int, ...]) -> Reply:
        """Let the environment answer: results of the turn's calls, or what its user says."""
        if self._over:
            return Reply()
        calls = self._calls(text)
        asked = {"text": _sound(text), "tokens": len(tokens), "calls": calls}
        said = self._ask({"do": "reply", **asked})
        self._over = "reward" in said
        return Reply(
            messages=tuple(self._message(one) for one in said["messages"]),
            calls=len(calls),
            failed_calls=int(said.get("failed", 0)),
        )

    def reward(self) -> float | None:
        """The library's rewards in sum; None if it gave none."""
        value = self._ask({"do": "end"}).get("reward")
        return float(value) if isinstance(value, int) else value

    def close(self) -> None:
        """End the episode's process."""
        if self._host.alive:
            self._ask({"do": "close"})

    def _ask(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._host.ask({**asked, "episode": self._number})

    def _calls(self, text: str) -> list[dict[str, Any]]:
        found = find_calls(text, self._about.calls) if self._has_tools else []
        calls = [_plain(call) for call in found[:MAX_CALLS]]
        more = [{"bad": f"at most {MAX_CALLS} calls a turn"}] if len(found) > MAX_CALLS else []
        return calls + more

    def _message(self, said: Mapping[str, str]) -> Message:
        role, content = said["role"], said["content"]
        if role not in _ROLES:
            raise ValueError(f"the environment speaks as {role!r:.40}")
        if role == "tool":
            return Message(role, told(content, self._about.max_result))
        return Message(role, _sound(content))


@final
class _Host:
    """A worker process and the episodes in it. It is asked by one thread at a time."""

    def __init__(self, about: Verifiers) -> None:
        """Start the process and wait until it has made the environment."""
        self._seconds = about.timeout_s + _GRACE_S
        self._lock = threading.Lock()
        self._worker = Worker(about.worker_setup())
        atexit.register(self.close)
        ready = self._worker.wait_ready()
        self.refusal = ready.text if isinstance(ready, Death) else ""
        self.tools: tuple[Mapping[str, object], ...] = ()
        if isinstance(ready, dict):
            self.tools = tuple(ready["tools"])

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._worker.alive

    def ask(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Its answer. Raises ServiceError if there is none, or it is that the episode failed."""
        with self._lock:
            if not self.alive:
                raise ServiceError("verifiers: the worker process has ended")
            answer = self._worker.ask(json.dumps(asked).encode(), self._seconds)
        if isinstance(answer, Death):
            raise ServiceError(f"verifiers: the worker process ended ({answer.kind})")
        if answer.error_kind is not None:
            raise ServiceError(f"verifiers: {answer.error_text}")
        value = answer.value
        if not isinstance(value, dict):
            raise ServiceError("verifiers: the worker's answer is no table")
        if "failure" in value:
            raise ServiceError(f"verifiers: {value['failure']}")
        return value

    def close(self) -> None:
        """End the process and its episodes."""
        self._worker.kill()
        atexit.unregister(self.close)


def _plain(call: Call | BadCall) -> dict[str, Any]:
    if isinstance(call, BadCall):
        return {"bad": call.reason}
    made = {"name": call.name, "arguments": call.arguments}
    try:
        json.dumps(made, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return {"bad": "a tool call must have no halves of surrogate pairs"}
    return made


def _sound(text: str) -> str:
    """``text`` without halves of surrogate pairs, which cannot be encoded."""
    return text.encode("utf-8", "replace").decode()
