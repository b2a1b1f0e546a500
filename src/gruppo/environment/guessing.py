"""A guessing game: the policy names numbers and is told "higher" or "lower".

The number to find is the problem's answer (the task ``guess`` makes such problems).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final

from gruppo.environment.base import Reply
from gruppo.environment.calls import spoken
from gruppo.types import Message, Problem

_NUMBER: Final = re.compile(r"-?\d+")
_MAX_DIGITS: Final = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class GuessingGame:
    """The last whole number of a turn is a guess; the right one ends the episode.

    The environment's reward is 1 for the right guess, less ``turn_cost`` for every turn before it
    (0 at least), and 0 for an episode that ends without it. ``wrong_format`` is what a turn
    without a number is told.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["guessing_game"] = "guessing_game"
    turn_cost: float = 0.0
    wrong_format: str = "Guess a whole number."

    def __post_init__(self) -> None:
        if not 0 <= self.turn_cost <= 1:
            raise ValueError(f"turn_cost = {self.turn_cost}: must be between 0 and 1")
        if not self.wrong_format.strip():
            raise ValueError("wrong_format is empty: a turn without a number must be told so")

    @property
    def tools(self) -> tuple[Mapping[str, object], ...]:
        """None: a guess is text."""
        return ()

    @property
    def instructions(self) -> str:
        """None: the problem's prompt says the rules."""
        return ""

    def prompt(self, problem: Problem) -> tuple[Message, ...]:
        """The problem's own prompt."""
        return problem.prompt

    def start(self, problem: Problem) -> Guessing:
        """An episode with the problem's number. Raises ValueError if its answer is none."""
        if problem.answer is None or not _NUMBER.fullmatch(problem.answer.strip()):
            raise ValueError(
                f"problem {problem.id!r}: answer {problem.answer!r:.80} is no whole number to guess"
            )
        return Guessing(self, int(problem.answer))


@final
class Guessing:
    """One game."""

    def __init__(self, game: GuessingGame, secret: int) -> None:
        self._game = game
        self._secret = secret
        self._turns = 0
        self._found = False

    def reply(self, text: str, tokens: tuple[int, ...]) -> Reply:
        """Say where the secret is; nothing if it was guessed."""
        self._turns += 1
        guesses = [g for g in _NUMBER.findall(spoken(text)) if len(g) <= _MAX_DIGITS]
        if not guesses:
            return _say(self._game.wrong_format)
        guess = int(guesses[-1])
        self._found = guess == self._secret
        if self._found:
            return Reply()
        return _say("higher" if self._secret > guess else "lower")

    def reward(self) -> float:
        """1 less the cost of the turns before the right guess; 0 without it."""
        if not self._found:
            return 0.0
        return max(0.0, 1.0 - math.fsum([self._game.turn_cost] * (self._turns - 1)))

    def close(self) -> None:
        """Free nothing."""


def _say(text: str) -> Reply:
    return Reply(messages=(Message("user", text),))
