"""A reward made ready to be tried: bounded in time, without memory, without what reads episodes.

The recipe's reward is left as it is; what is tried is a copy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gruppo.reward import (
    Code,
    EnvironmentReward,
    Function,
    Judge,
    Pairwise,
    Part,
    Remote,
    RewardSet,
    Service,
    ToolUse,
    Verifier,
    Verifiers,
)

DEADLINE_S: Final = 10.0
"""An answer of a function or service gets no longer here, whatever the recipe allows."""

_CALL_DEADLINE_S: Final = 120.0  # all requests of a group: there are many attacks in one
_RETRIES: Final = 1


def without_episodes(reward: RewardSet) -> tuple[RewardSet, tuple[str, ...]]:
    """``reward`` without the parts that read an episode, and their names.

    Made completions are texts: no environment answered them. A gate on such a part is left out too.

    Raises:
        ValueError: no task part is left.
    """
    skipped = tuple(
        p.name for p in reward.parts if isinstance(p.reward, EnvironmentReward | ToolUse)
    )
    if not skipped:
        return reward, ()
    tasks = tuple(name for name in reward.task_names if name not in skipped)
    if not tasks:
        raise ValueError(
            f"reward.parts.{reward.task_names[0]} reads what an environment says of an episode, "
            "and made completions have none: there is no task reward to try on texts"
        )
    parts = tuple(
        replace(part, gate=None) if part.gate is not None and part.gate.part in skipped else part
        for part in reward.parts
        if part.name not in skipped
    )
    return replace(reward, parts=parts, task=tasks), skipped


def with_deadline(reward: RewardSet, seconds: float = DEADLINE_S) -> RewardSet:
    """``reward`` with functions and services that get at most ``seconds`` for an answer.

    Grading models forget their verdicts, so that equal questions are asked again: a verdict that
    is read from memory says nothing of whether the model would give it twice.
    """
    return replace(reward, parts=tuple(_bounded(part, seconds) for part in reward.parts))


def code_alone(reward: RewardSet) -> RewardSet | None:
    """``reward`` with nothing but its parts that run programs; None if it has none."""
    parts = tuple(replace(p, gate=None) for p in reward.parts if isinstance(p.reward, Code))
    return RewardSet(parts) if parts else None


def _bounded(part: Part, seconds: float) -> Part:
    match part.reward:
        case Function() | Verifiers() as made:
            return replace(part, reward=replace(made, timeout_s=min(made.timeout_s, seconds)))
        case Remote() as made:
            return replace(part, reward=replace(made, service=_hurried(made.service, seconds)))
        case Judge() | Pairwise() | Verifier() as made:
            model, service = replace(made.model, keep="none"), _hurried(made.service, seconds)
            return replace(part, reward=replace(made, model=model, service=service))
        case _:
            return part


def _hurried(service: Service, seconds: float) -> Service:
    return replace(
        service,
        timeout_s=min(service.timeout_s, seconds),
        deadline_s=min(service.deadline_s, _CALL_DEADLINE_S),
        retries=min(service.retries, _RETRIES),
    )
