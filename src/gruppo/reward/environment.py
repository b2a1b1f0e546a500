"""Rewards of episodes: what the environment says, and whether tools were used.

Neither reads a text: both look at what the episode recorded of itself. ``score_sound`` keeps
completions whose environment failed away from every reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from gruppo.reward.base import GroupRows, RewardSet, Value, ungraded
from gruppo.types import Completion, Failure, Problem, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentReward:
    """What the environment itself says of the episode (a game's result, ``get_reward`` of TRL).

    A completion without an episode, or of an environment that judges nothing, is unscored.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["environment"] = "environment"

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade ``completions``; the problem is not read."""
        return [self._grade(completion) for completion in completions]

    def _grade(self, completion: Completion) -> Value:
        if completion.interaction is None or completion.interaction.reward is None:
            text = "the environment gives no reward: use another kind, or another environment"
            return ungraded("environment_silent", text)
        return completion.interaction.reward


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """1 if at least one tool call of the episode succeeded, else 0.

    Meant as a small part beside the task's: more calls earn nothing, so that none are made for
    their own sake.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["tool_use"] = "tool_use"

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade ``completions``; the problem is not read."""
        return [float(used_tools(completion)) for completion in completions]


def used_tools(completion: Completion) -> bool:
    """Whether a tool call of the completion succeeded."""
    episode = completion.interaction
    return episode is not None and episode.calls > episode.failed_calls


def score_sound(reward: RewardSet, groups: Sequence[GroupRows]) -> list[tuple[Score, ...]]:
    """Score all groups; completions whose environment failed are unscored, and no reward sees them.

    Group-wise terms then compare the others alone.
    """
    if all(row.finish != "error" for _, rows in groups for row in rows):
        return reward.score_groups(groups)
    sound = [(problem, [row for row in rows if row.finish != "error"]) for problem, rows in groups]
    graded = iter(reward.score_groups([pair for pair in sound if pair[1]]))
    names = [part.name for part in reward.parts]
    scores = []
    for (_, rows), (_, left) in zip(groups, sound, strict=True):
        marks = iter(next(graded) if left else ())
        scores.append(
            tuple(_unscored(row, names) if row.finish == "error" else next(marks) for row in rows)
        )
    return scores


def _unscored(row: Completion, names: Sequence[str]) -> Score:
    episode = row.interaction
    text = "an unknown error" if episode is None or episode.error is None else episode.error
    failure = Failure(kind="environment", fault="grader", text=text)
    return Score(total=None, task=None, parts=dict.fromkeys(names), error=failure)
