"""Environments: what answers a policy's turns, and the episodes made of both.

``KINDS`` holds the records that a recipe can name by their ``kind``.
"""

from gruppo.environment.base import Continue, Environment, Episode, Limits, Reply, ToolError
from gruppo.environment.calculator import Calculator, calculate
from gruppo.environment.episodes import Episodes
from gruppo.environment.guessing import GuessingGame
from gruppo.environment.python import (
    BoxRunner,
    Python,
    Runner,
    python_environment,
    python_tool,
)
from gruppo.environment.tools import Tool, Toolbox
from gruppo.environment.trl import Trl, TrlEnvironment
from gruppo.environment.verifiers import Verifiers, VerifiersEnvironment

KINDS: dict[str, type] = {
    "calculator": Calculator,
    "guessing_game": GuessingGame,
    "python": Python,
    "trl": Trl,
    "verifiers": Verifiers,
}

__all__ = [
    "KINDS",
    "BoxRunner",
    "Calculator",
    "Continue",
    "Environment",
    "Episode",
    "Episodes",
    "GuessingGame",
    "Limits",
    "Python",
    "Reply",
    "Runner",
    "Tool",
    "ToolError",
    "Toolbox",
    "Trl",
    "TrlEnvironment",
    "Verifiers",
    "VerifiersEnvironment",
    "calculate",
    "python_environment",
    "python_tool",
]
