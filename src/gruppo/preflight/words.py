"""What each batch setting means in this recipe, a line each. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator

from gruppo.recipe import Recipe


def knobs(recipe: Recipe) -> Iterator[str]:
    """The settings that people mix up, with their values and what those do here."""
    rollout, train, engine = recipe.rollout, recipe.train, recipe.engine
    rows = rollout.prompts_per_step * rollout.group_size
    updates = train.inner_epochs * train.minibatches
    yield (
        f"rollout.prompts_per_step = {rollout.prompts_per_step}: different problems a step; more "
        "of them make the gradient less noisy"
    )
    yield (
        f"rollout.group_size = {rollout.group_size}: completions of each problem that are compared "
        f"with each other; {rows} completions a step"
    )
    yield (
        f"train.minibatches = {train.minibatches}: optimizer steps that a step's "
        f"{rollout.prompts_per_step} groups are cut into, "
        f"{rollout.prompts_per_step / train.minibatches:.3g} groups each"
    )
    yield (
        f"train.inner_epochs = {train.inner_epochs}: times that each completion is learned from; "
        f"{updates} updates a step, {train.num_updates:,} in all, {_degree(updates)}"
    )
    yield (
        f"train.tokens_per_microbatch = {train.tokens_per_microbatch:,}: tokens of one forward "
        "pass; memory and speed only, no result depends on it"
    )
    yield (f"engine.max_rows = {engine.max_rows}: completions drawn at once; memory and speed only")
    yield (
        f"rollout.max_tokens = {rollout.max_tokens}: where a completion is cut; the longest one "
        "decides how long a step draws"
    )


def _degree(updates: int) -> str:
    """How far from on-policy the last of them is."""
    if updates == 1:
        return "strictly on-policy (clipping is inactive)"
    return f"off-policy: the last one learns from completions {updates - 1} updates old"
