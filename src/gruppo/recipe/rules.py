"""Rules between sections: settings that are fine alone and senseless together.

Each rule names the sections it reads and runs when those are sound, so that a mistake elsewhere
does not hide it. What concerns one section stands in its record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gruppo.recipe.credit_rules import find_unfit, find_unread
from gruppo.recipe.mistakes import Mistake, mistake


@dataclass(frozen=True, slots=True)
class Rule:
    """A check over the sections it names, in that order; it yields mistakes."""

    sections: tuple[str, ...]
    check: Callable[..., Iterator[Mistake]]


def find_conflicts(sections: Mapping[str, Any]) -> list[Mistake]:
    """Problems of all rules whose sections are there."""
    return [
        found
        for rule in RULES
        if all(name in sections for name in rule.sections)
        for found in rule.check(*(sections[name] for name in rule.sections))
    ]


def _group_size(rollout: Any, objective: Any) -> Iterator[Mistake]:
    """An estimator that compares a group's completions needs some to compare."""
    credit = objective.build(max_tokens=rollout.max_tokens).credit
    if rollout.group_size < credit.min_group:
        yield mistake(
            "rollout.group_size",
            f"is too small: objective.credit compares the completions of a prompt and needs at "
            f"least {credit.min_group}",
            rollout.group_size,
        )


def _lone_rows(rollout: Any) -> Iterator[Mistake]:
    """One completion differs from no other, so a filter of dead groups would leave nothing."""
    if rollout.group_size == 1 and rollout.filter in ("drop", "resample"):
        yield mistake(
            "rollout.filter",
            "leaves nothing to train on: it keeps the groups whose rewards differ, and "
            'rollout.group_size = 1 has none; use "skip" or a larger group',
            rollout.filter,
        )


def _minibatches(rollout: Any, train: Any) -> Iterator[Mistake]:
    """A mini-batch holds whole groups, and has at least one."""
    if train.minibatches > rollout.prompts_per_step:
        yield mistake(
            "train.minibatches",
            f"must be at most rollout.prompts_per_step ({rollout.prompts_per_step}): a "
            "mini-batch holds whole groups",
            train.minibatches,
        )


def _budgets(reward: Any, rollout: Any) -> Iterator[Mistake]:
    """Length terms must fit the rollout's budget."""
    try:
        reward.build(max_tokens=rollout.max_tokens)
    except ValueError as error:
        yield mistake("reward.parts", str(error))


def _reference(train: Any, objective: Any) -> Iterator[Mistake]:
    """A reference that nobody reads need not be moved."""
    needed = objective.build(max_tokens=1).needs_reference
    if train.reference_sync_steps and not needed:
        yield mistake(
            "train.reference_sync_steps",
            "has no effect: the objective has no KL term; add objective.kl or leave it out",
            train.reference_sync_steps,
        )


def _patience(evaluation: Any, data: Any) -> Iterator[Mistake]:
    """Stopping on held-out results needs held-out problems."""
    if evaluation.patience and not (data.held_out or data.test):
        yield mistake(
            "eval.patience",
            "needs problems to evaluate on: set data.held_out or data.test",
            evaluation.patience,
        )
    if evaluation.patience and not evaluation.every:
        yield mistake(
            "eval.patience",
            "needs evaluations during training: set eval.every",
            evaluation.patience,
        )


def _dialogue(environment: Any, data: Any) -> Iterator[Mistake]:
    """An environment answers in turns, which plain text has not."""
    if environment.use is not None and not data.chat:
        yield mistake("data.chat", "environment.use needs a chat template: set it to true", False)


def _judged(environment: Any, reward: Any) -> Iterator[Mistake]:
    """What grades an episode needs episodes."""
    names = [part.name for part in reward.parts if part.kind in ("environment", "tool_use")]
    if names and environment.use is None:
        yield mistake("reward.parts", "grades an episode: set environment.use", names[0])


def _kept(engine: Any, model: Any, train: Any, environment: Any) -> Iterator[Mistake]:
    """Activations are kept for one update, of completions of one turn, by the fast path."""
    obstacles = {
        'engine.kind = "plain"': engine.kind == "plain",
        "model.packing = false": not model.packing,
        "model.gradient_checkpointing = true": model.gradient_checkpointing,
        "model.lora.dropout > 0": model.lora is not None and model.lora.dropout > 0,
        # later updates would compute again, and ratios would hold the two passes' rounding
        "several updates a step": train.inner_epochs * train.minibatches > 1,
        "an environment": environment.use is not None,
    }
    found = [name for name, is_there in obstacles.items() if is_there]
    if engine.max_kept_gib and found:
        yield mistake(
            "engine.max_kept_gib",
            f"keeps nothing that is of use with {' and '.join(found)}; leave it at 0",
            engine.max_kept_gib,
        )


RULES: Final = (
    Rule(("environment", "data"), _dialogue),
    Rule(("environment", "reward"), _judged),
    Rule(("rollout", "objective"), _group_size),
    Rule(("rollout",), _lone_rows),
    Rule(("rollout", "train"), _minibatches),
    Rule(("reward", "rollout"), _budgets),
    Rule(("train", "objective"), _reference),
    Rule(("reward", "rollout", "objective"), find_unread),
    Rule(("reward", "rollout", "objective"), find_unfit),
    Rule(("eval", "data"), _patience),
    Rule(("engine", "model", "train", "environment"), _kept),
)
