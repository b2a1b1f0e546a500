"""Whole episodes: the policy's turns from the engine, the answers between them from an environment.

The first turns of a group are drawn from its prompt as one request, so it is computed once; later
turns continue each completion from its own tokens. Nothing is re-tokenised: a completion is the
policy's tokens as drawn and the environment's as encoded, in the order in which the model saw them.
All running episodes take a turn together, in one call of the engine.

What is drawn does not depend on the company: every completion draws from a stream of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real

from gruppo.environment.base import Continue, Environment, Episode, Limits, Reply
from gruppo.environment.watched import Broken, T, call_all
from gruppo.types import (
    Completion,
    Ended,
    Engine,
    Finish,
    Interaction,
    Message,
    Problem,
    Request,
    Sampling,
)

_FINISH: dict[Ended, Finish] = {
    "environment": "stop",
    "length": "length",
    "turns": "limit",
    "tokens": "limit",
    "abort": "abort",
    "error": "error",
}


@dataclass(slots=True)
class _Run:
    """A completion on its way: what the model has seen of it, and how its episode stands."""

    problem: Problem
    request: Request
    sample: int
    budget: int
    episode: Episode | None = None
    drawn: list[Completion] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    reply: Reply = field(default_factory=Reply)
    calls: int = 0
    failed_calls: int = 0
    reward: float | None = None
    ended: Ended | None = None
    error: str | None = None

    def take(self, turn: Completion) -> None:
        """Append a turn of the policy."""
        self.drawn.append(turn)
        self.tokens += turn.tokens
        self.logp += turn.logp
        self.mask += turn.mask
        self.version += turn.version
        self.messages.append(Message("assistant", turn.text))
        if turn.finish != "stop":
            self.ended = "abort" if turn.finish == "abort" else "length"

    def answer(self, ids: Sequence[int]) -> None:
        """Append what the environment answered, encoded as ``ids``."""
        self.tokens += ids
        self.logp += [math.nan] * len(ids)
        self.mask += [False] * len(ids)
        self.version += [self.version[-1]] * len(ids)
        self.messages += self.reply.messages

    def fail(self, broken: Broken, what: str) -> None:
        self.ended, self.error = "error", f"{what}: {broken.text}"

    def next_request(self, most: int | None) -> Request:
        """The request of the next turn; its stream is this completion's alone."""
        left = self.budget - len(self.tokens)
        return Request(
            tokens=(*self.request.tokens, *self.tokens),
            num_samples=1,
            key=(*self.request.key, self.sample),
            offset=len(self.tokens),
            max_tokens=left if most is None else min(left, most),
        )

    def completion(self) -> Completion:
        assert self.ended is not None, "an episode that goes on is no completion"
        return Completion(
            tokens=tuple(self.tokens),
            logp=tuple(self.logp),
            mask=tuple(self.mask),
            version=tuple(self.version),
            text=self.drawn[-1].text,
            finish=_FINISH[self.ended],
            interaction=Interaction(
                messages=tuple(self.messages),
                ended=self.ended,
                calls=self.calls,
                failed_calls=self.failed_calls,
                reward=self.reward,
                error=self.error,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Episodes:
    """Draws completions that are episodes with ``environment``.

    ``context`` is the most tokens that the model reads, None if that is open. What the environment
    raises, or does not answer within ``limits.max_seconds``, ends that completion alone.
    """

    engine: Engine
    environment: Environment
    encoder: Continue
    limits: Limits
    context: int | None = None

    def draw(
        self, problems: Sequence[Problem], requests: Sequence[Request], sampling: Sampling
    ) -> list[tuple[Completion, ...]]:
        """Play ``num_samples`` episodes for every request, which is of the same-placed problem."""
        pairs = list(zip(problems, requests, strict=True))
        groups = [
            [_Run(problem, request, i, self._budget(request, sampling)) for i in range(n)]
            for problem, request in pairs
            for n in [request.num_samples]
        ]
        runs = [run for group in groups for run in group]
        first = self.engine.generate([self._capped(r, sampling) for r in requests], sampling)
        for group, turns in zip(groups, first, strict=True):
            for run, turn in zip(group, turns, strict=True):
                run.take(turn)
        try:
            self._start(runs)
            while running := self._answered(runs):
                asked = [run.next_request(self.limits.max_turn_tokens) for run in running]
                for run, turns in zip(running, self.engine.generate(asked, sampling), strict=True):
                    run.take(turns[0])
            self._judge(runs)
        finally:
            self._close(runs)
        return [tuple(run.completion() for run in group) for group in groups]

    def _budget(self, request: Request, sampling: Sampling) -> int:
        """Most tokens of a whole completion of ``request``."""
        if self.context is None:
            return sampling.max_tokens
        return min(sampling.max_tokens, self.context - len(request.tokens))

    def _capped(self, request: Request, sampling: Sampling) -> Request:
        most = self.limits.max_turn_tokens
        return request if most is None else replace(request, max_tokens=most)

    def _start(self, runs: Sequence[_Run]) -> None:
        chosen = [run for run in runs if run.ended != "abort"]
        started = self._call([partial(self.environment.start, run.problem) for run in chosen])
        for run, episode in zip(chosen, started, strict=True):
            if isinstance(episode, Episode):
                run.episode = episode
            else:
                run.fail(_broken(episode, "an Episode"), "start")

    def _answered(self, runs: Sequence[_Run]) -> list[_Run]:
        """Ask the environment about every open turn; the runs that go on."""
        asked = [(run, run.episode) for run in runs if run.ended is None and run.episode]
        replies = self._call(
            [partial(e.reply, run.drawn[-1].text, run.drawn[-1].tokens) for run, e in asked]
        )
        for (run, _), reply in zip(asked, replies, strict=True):
            if isinstance(reply, Reply):
                self._continue(run, reply)
            else:
                run.fail(_broken(reply, "a Reply"), "reply")
        return [run for run, _ in asked if run.ended is None]

    def _continue(self, run: _Run, reply: Reply) -> None:
        """Append ``reply`` to the run, or end it."""
        run.reply = reply
        run.calls += reply.calls
        run.failed_calls += reply.failed_calls
        if not reply.messages:
            run.ended = "environment"
        elif len(run.drawn) >= self.limits.max_turns:
            run.ended = "turns"
        else:
            self._append(run)

    def _append(self, run: _Run) -> None:
        try:
            ids = self.encoder.continuation(run.reply.messages, after=run.tokens[-1])
        except ValueError as error:
            run.fail(Broken(str(error)), "reply")
            return
        if len(run.tokens) + len(ids) >= run.budget:
            run.ended = "tokens"
        else:
            run.answer(ids)

    def _judge(self, runs: Sequence[_Run]) -> None:
        judged = [(run, run.episode) for run in runs if run.ended != "error" and run.episode]
        rewards = self._call([episode.reward for _, episode in judged])
        for (run, _), reward in zip(judged, rewards, strict=True):
            if reward is None:
                continue
            if isinstance(reward, Real) and math.isfinite(reward):
                run.reward = float(reward)
            else:
                run.fail(_broken(reward, "a finite number or None"), "reward")

    def _close(self, runs: Sequence[_Run]) -> None:
        opened = [(run, run.episode) for run in runs if run.episode]
        closed = self._call([episode.close for _, episode in opened])
        for (run, _), outcome in zip(opened, closed, strict=True):
            if isinstance(outcome, Broken) and run.error is None:
                run.error = f"close: {outcome.text}"  # told; the episode itself was sound

    def _call(self, functions: Sequence[Callable[[], T]]) -> list[T | Broken | None]:
        return call_all(functions, seconds=self.limits.max_seconds, workers=self.limits.workers)


def _broken(value: object, wanted: str) -> Broken:
    if isinstance(value, Broken):
        return value
    return Broken(f"gave {type(value).__name__} {value!r:.80}, not {wanted}")
