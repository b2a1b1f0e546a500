"""Rules on what a credit reads of the reward: settings that it would not see, or could not take.

A reward function of the user's own may return anything: what it gives is seen only when it runs,
and then the credit itself refuses it. Here stands what the recipe's own settings already say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from gruppo.objective import MaxRl, PasskAnalytic, Process, innermost, reads_total
from gruppo.recipe.fields import kind_of
from gruppo.recipe.mistakes import Mistake, mistake
from gruppo.reward import SHAPE_KINDS, Function

_FUNCTION: Final = kind_of(Function)


def takes_shaping(credit: object) -> bool:
    """Whether a shaping term, which may be negative and any fraction, can reach the advantages."""
    return reads_total(credit) and not isinstance(innermost(credit), MaxRl | PasskAnalytic)


def find_unread(reward: Any, rollout: Any, objective: Any) -> Iterator[Mistake]:
    """What changes the total alone does nothing to a credit that does not read it."""
    credit = objective.build(max_tokens=rollout.max_tokens).credit
    if reads_total(credit):
        return
    reason = "has no effect: objective.credit reads the reward's parts or steps, not their total"
    if rollout.truncation in ("zero_reward", "penalty"):
        fix = 'use "mask_after" or "exclude_before"'
        yield mistake("rollout.truncation", f"{reason}; {fix}", rollout.truncation)
    for part in reward.parts:
        if part.shape and _counts(part):
            fix = "set shape = false, where its kind allows that, or leave it out"
            path = f"reward.parts.{part.name}"
            yield mistake(path, f"{reason}, and this one only shapes; {fix}")
    if reward.clip_range is not None:
        yield mistake("reward.clip_range", f"{reason}; leave it out", reward.clip_range)


def find_unfit(reward: Any, rollout: Any, objective: Any) -> Iterator[Mistake]:
    """Rewards that a credit refuses, as far as the settings say that they will come."""
    credit = innermost(objective.build(max_tokens=rollout.max_tokens).credit)
    if isinstance(credit, PasskAnalytic):
        yield from _not_binary(reward, rollout)
    if isinstance(credit, MaxRl):
        yield from _negative(reward, rollout)
    if isinstance(credit, Process):
        yield from _without_steps(reward)


def _without_steps(reward: Any) -> Iterator[Mistake]:
    """Steps are those of the task parts, and only a function of the user's own can give some."""
    tasks = _task_names(reward)
    if not any(part.kind == _FUNCTION for part in reward.parts if part.name in tasks):
        yield mistake(
            "reward.task" if reward.task is not None else "reward.parts",
            f"{', '.join(tasks)} gives no process rewards, of which objective.credit (process) "
            "makes advantages: all would be 0. Use another credit, or make the task a reward "
            'function of your own that returns Scores with steps (kind = "function")',
        )


def _task_names(reward: Any) -> tuple[str, ...]:
    if reward.task is None:
        return tuple(part.name for part in reward.parts if not part.shape)[:1]
    return (reward.task,) if isinstance(reward.task, str) else reward.task


def _not_binary(reward: Any, rollout: Any) -> Iterator[Mistake]:
    reason = "makes rewards other than 0 and 1, which objective.credit (passk_analytic) needs"
    tasks = _task_names(reward)
    for part in reward.parts:
        path = f"reward.parts.{part.name}"
        added = part.shape or (part.name not in tasks and reward.clip_range is None)
        if not _counts(part):
            continue
        if added:
            yield mistake(path, f"is added to the task's reward and {reason}; leave it out")
        elif part.name in tasks and part.weight != 1:
            yield mistake(f"{path}.weight", f"{reason}; use 1.0", part.weight)
        elif part.minimum not in (-1, 0, 1):
            yield mistake(f"{path}.minimum", f"{reason}; use 0.0", part.minimum)
        yield from _changed(part, path, reason)
    if rollout.truncation == "penalty" and rollout.truncation_penalty not in (-1, 0, 1):
        yield mistake(
            "rollout.truncation_penalty",
            f'{reason}; use truncation = "zero_reward"',
            rollout.truncation_penalty,
        )


def _counts(part: Any) -> bool:
    """Whether the part's weight is, or comes to be, other than 0."""
    return part.weight != 0 or part.ramp is not None


def _heaviest(part: Any) -> float:
    """The weight of the largest size that the part ever has."""
    last = part.weight if part.ramp is None else part.ramp.to
    return last if abs(last) > abs(part.weight) else part.weight


def _changed(part: Any, path: str, reason: str) -> Iterator[Mistake]:
    """What makes other numbers than 0 and 1 of a task that gives those."""
    if part.ramp is not None:
        yield mistake(f"{path}.ramp", f"{reason}; leave it out", part.ramp)
    if part.clip is not None:
        yield mistake(f"{path}.clip", f"{reason}; leave it out", part.clip)
    if part.gate is not None and part.gate.otherwise not in (None, -1, 0, 1):
        yield mistake(f"{path}.gate.otherwise", f"{reason}; use 0.0", part.gate.otherwise)


def _negative(reward: Any, rollout: Any) -> Iterator[Mistake]:
    reason = "can make rewards negative, which objective.credit (maxrl) cannot divide by"
    if reward.clip_range is None or reward.clip_range[0] < 0:
        fix = "leave it out, or set reward.clip_range = [0.0, 1.0]"
        for part in reward.parts:
            path = f"reward.parts.{part.name}"
            if _counts(part) and part.kind in SHAPE_KINDS:
                yield mistake(path, f"{reason}; {fix}")
            elif part.weight < 0:
                yield mistake(f"{path}.weight", f"{reason}; {fix}", part.weight)
            elif _heaviest(part) * part.minimum < 0:
                yield mistake(f"{path}.minimum", f"{reason}; {fix}", part.minimum)
            if part.ramp is not None and part.ramp.to < 0:
                yield mistake(f"{path}.ramp.to", f"{reason}; {fix}", part.ramp.to)
            if part.gate is not None and _heaviest(part) * (part.gate.otherwise or 0.0) < 0:
                yield mistake(f"{path}.gate.otherwise", f"{reason}; {fix}", part.gate.otherwise)
    if rollout.truncation == "penalty" and rollout.truncation_penalty < 0:
        yield mistake(
            "rollout.truncation_penalty",
            f'{reason}; use truncation = "zero_reward"',
            rollout.truncation_penalty,
        )
