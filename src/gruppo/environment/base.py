"""What an environment is: it gets the policy's turns, and answers with messages or ends.

These are protocols and the limits of an episode. An environment is made of plain Python objects;
it knows no engine and no token ids but those it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from gruppo.types import Message, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What an environment answers to a turn: ``messages``, of which none ends the episode.

    ``calls`` and ``failed_calls`` count the tool calls of the turn as in ``Interaction``.
    """

    messages: tuple[Message, ...] = ()
    calls: int = 0
    failed_calls: int = 0


@runtime_checkable
class Episode(Protocol):
    """One run of an environment, for one completion. It is called from one thread at a time."""

    def reply(self, text: str, tokens: tuple[int, ...]) -> Reply:
        """Answer the policy's turn: its text, and its tokens as drawn (end token included)."""
        ...

    def reward(self) -> float | None:
        """What the environment thinks of the episode, asked once when it is over."""
        ...

    def close(self) -> None:
        """Free what the episode holds; called once, at its end, whatever ended it."""
        ...


@runtime_checkable
class Environment(Protocol):
    """Answers the policy's turns. What it raises is its own fault: the completion is unscored."""

    @property
    def tools(self) -> tuple[Mapping[str, object], ...]:
        """JSON schemas of the functions that the policy may call, for the chat template."""
        ...

    @property
    def instructions(self) -> str:
        """The same in words, for the system prompt where a template takes no tools; "" if none."""
        ...

    def prompt(self, problem: Problem) -> tuple[Message, ...]:
        """The prompt of ``problem`` here, the same for all its episodes."""
        ...

    def start(self, problem: Problem) -> Episode:
        """Begin an episode on ``problem``."""
        ...


@runtime_checkable
class Continue(Protocol):
    """Knows how a chat goes on after an assistant's turn."""

    def continuation(self, messages: Sequence[Message], *, after: int) -> tuple[int, ...]:
        """Return the token ids of ``messages`` and of the next turn's opening.

        They stand after the policy's turn, whose last token is ``after``: the end of that turn is
        added if it is not the turn's own last token.
        """
        ...


class ToolError(Exception):
    """The policy asked a tool for something that it refuses; the text is told to the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an episode may take.

    The policy has at most ``max_turns`` turns, of at most ``max_turn_tokens`` tokens each (None:
    of what is left of the completion's budget, which counts the environment's tokens too). Each
    call into an environment may take ``max_seconds``; ``workers`` are called at once.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    max_turns: int = 4
    max_turn_tokens: int | None = None
    max_seconds: float = 30.0
    workers: int = 1

    def __post_init__(self) -> None:
        for name, value in (("max_turns", self.max_turns), ("workers", self.workers)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if self.max_turn_tokens is not None and self.max_turn_tokens < 1:
            raise ValueError(f"max_turn_tokens = {self.max_turn_tokens}: must be at least 1")
        if not 0 < self.max_seconds <= 86_400:
            raise ValueError(
                f"max_seconds = {self.max_seconds}: must be above 0 and at most 86400 (a day)"
            )
