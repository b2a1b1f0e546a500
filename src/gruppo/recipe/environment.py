"""The ``[environment]`` section: what answers the policy's turns, and the limits of an episode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Discriminator

from gruppo.environment import (
    Calculator,
    Environment,
    GuessingGame,
    Limits,
    Python,
    Trl,
    Verifiers,
)
from gruppo.recipe.custom import Custom
from gruppo.types import Message

AnyEnvironment = Annotated[
    Calculator | GuessingGame | Python | Trl | Verifiers | Custom, Discriminator("kind")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentSection:
    """What completions are: one turn, or an episode with an environment.

    ``use`` is the environment: a ``kind`` with its settings, or "package.module:NAME", an object or
    class of your own (see ``gruppo.environment.Environment``). Without it completions are one turn.
    The policy has at most ``max_turns`` turns of at most ``max_turn_tokens`` tokens (else: what is
    left of ``max_tokens`` of the rollout, which counts the environment's tokens too). An answer of
    the environment may take ``max_seconds``; ``workers`` episodes are answered at once.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    use: AnyEnvironment | None = None
    max_turns: int = 4
    max_turn_tokens: int | None = None
    max_seconds: float = 30.0
    workers: int = 1

    def __post_init__(self) -> None:
        self.limits()
        if isinstance(self.use, Python):
            self.use.check(self.max_seconds)
        if isinstance(self.use, Verifiers):
            self.use.check(self.max_seconds, self.workers)

    def limits(self) -> Limits:
        """The limits of an episode. Raises ValueError for one that is out of range."""
        return Limits(
            max_turns=self.max_turns,
            max_turn_tokens=self.max_turn_tokens,
            max_seconds=self.max_seconds,
            workers=self.workers,
        )

    def open(self, report: Callable[[str], None] = lambda text: None) -> Environment | None:
        """Make the environment; None if completions are one turn.

        Raises:
            ValueError: it cannot be made, or is no environment.
        """
        match self.use:
            case None:
                return None
            case Python() as tool:
                return tool.open(report)
            case Trl() | Verifiers() as made:
                return made.open()
            case Custom() as custom:
                return _checked(custom)
            case own:
                return own


def _checked(custom: Custom) -> Environment:
    made = custom.build()
    if isinstance(made, Environment):
        return made
    raise ValueError(
        f"environment.use = {custom.name!r}: {type(made).__name__} is no environment: it needs "
        "tools, instructions, prompt(problem) and start(problem), see gruppo.environment"
    )


def probe(environment: Environment) -> list[Message]:
    """Messages such as the environment answers with, to try the chat template on.

    A turn may call tools twice, and is then answered twice.
    """
    return [Message("tool", "?")] * 2 if environment.tools else [Message("user", "?")]
