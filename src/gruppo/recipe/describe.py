"""A recipe in words: what a step samples, how it is split, and what that means.

Arithmetic only; it opens nothing. Token counts are upper bounds, because completions end early.
"""

from __future__ import annotations

from gruppo.objective import Objective, Reinforce
from gruppo.recipe.answers import describe_check
from gruppo.recipe.recipe import Recipe

_FILTERS = {
    "keep": "are trained on like the others",
    "skip": "are left out of the passes; the gradient is the same",
    "drop": "are taken out of the batch",
    "resample": "are replaced by further problems, up to rollout.max_gen_batches batches a step",
}


def describe(recipe: Recipe) -> str:
    """The batch arithmetic of ``recipe``, one fact a line."""
    lines = [*_rollout(recipe), *_updates(recipe), *_evaluation(recipe)]
    return "\n".join([*lines, describe_check(recipe.reward)])


def _rollout(recipe: Recipe) -> list[str]:
    rollout, steps = recipe.rollout, recipe.train.steps
    rows = rollout.prompts_per_step * rollout.group_size
    lines = [
        f"{rollout.prompts_per_step} prompts x {rollout.group_size} = {rows} completions a step, "
        f"of at most {rollout.max_tokens} tokens (at most {rows * rollout.max_tokens:,} a step)",
        f"{steps} steps: {rows * steps:,} completions of {rollout.prompts_per_step * steps:,} "
        "prompts",
        f"groups without differing rewards {_FILTERS[rollout.filter]}",
    ]
    if recipe.environment.use is not None:
        turns, kind = recipe.environment.max_turns, recipe.environment.use.kind
        lines.append(
            f"a completion is an episode of at most {turns} turns with {kind}; the environment's "
            "tokens count, and are not trained"
        )
    greedy = recipe.objective.build(max_tokens=rollout.max_tokens).needs_greedy
    return (
        [*lines, "one greedy completion more for every prompt (the baseline)"] if greedy else lines
    )


def _updates(recipe: Recipe) -> list[str]:
    rollout, train, optim = recipe.rollout, recipe.train, recipe.optim
    objective = recipe.objective.build(max_tokens=rollout.max_tokens)
    per_rollout = train.inner_epochs * train.minibatches
    prompts = rollout.prompts_per_step / train.minibatches
    size = f"{prompts:g}" if prompts.is_integer() else f"{int(prompts)} to {int(prompts) + 1}"
    lines = [
        f"{_count(per_rollout, 'optimizer step')} per rollout ({train.inner_epochs} x "
        f"{train.minibatches} mini-batches of {size} whole groups), {train.num_updates:,} in all",
        _policy_words(objective, per_rollout),
        f"micro-batches of at most {train.tokens_per_microbatch:,} tokens: they bound memory and "
        "change nothing else",
        f"learning rate {optim.lr:g}, {optim.schedule} after {optim.warmup_steps} warm-up updates",
    ]
    if optim.warmup_steps >= train.num_updates:
        lines.append("note: the warm-up is longer than the run; the full rate is never reached")
    passes = _passes(objective.needs_old(per_rollout), objective.needs_reference)
    return [*lines, f"forward passes besides training: {passes}"]


def _policy_words(objective: Objective, per_rollout: int) -> str:
    """How far the updates are from the policy that drew, and what the loss does about it."""
    surrogate = objective.surrogate
    clips = " and clipping is inactive" if surrogate.uses_clip else ""
    if per_rollout == 1:
        of = "1, but for the engine's mismatch" if surrogate.bypass else "1"
        return f"strictly on-policy: ratios are {of}{clips}"
    if isinstance(surrogate, Reinforce):
        return (
            "off-policy within a rollout, and this loss does not correct for it: it has no "
            "importance ratio; train.minibatches = 1 and train.inner_epochs = 1 are meant for it"
        )
    bounded = "clipping is active" if surrogate.uses_clip else "the loss weighs by them"
    return f"off-policy within a rollout: ratios move away from 1 and {bounded}"


def _passes(old: bool, reference: bool) -> str:
    names = ["old log-probabilities"] * old + ["reference log-probabilities"] * reference
    return ", ".join(names) or "none"


def _evaluation(recipe: Recipe) -> list[str]:
    settings, data = recipe.eval, recipe.data
    if not (data.held_out or data.test):
        return ["no evaluation: no problems are held out (data.held_out, data.test)"]
    when = f"every {settings.every} steps, " if settings.every else ""
    held = f"{settings.problems or data.held_out} held-out problems"
    if data.test:
        held = f"up to {settings.problems} problems" if settings.problems else "all test problems"
    kinds = ["1 greedy"] * settings.greedy
    kinds += [f"{settings.samples} at temperature {settings.temperature:g}"] * bool(
        settings.samples
    )
    return [f"evaluation {when}before and after: {held}, {' and '.join(kinds)} completions each"]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
