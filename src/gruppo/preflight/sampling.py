"""Draws groups as training would, in batches of the recipe's own size, and keeps them all.

The draws are not those of the run: what is measured later is then a new sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from gruppo.data import ProblemStream
from gruppo.recipe import Recipe
from gruppo.recipe.build import Opened, make_sampler
from gruppo.recipe.problems import Splits
from gruppo.reward import RewardSet
from gruppo.rollout import Collected, Rollouts
from gruppo.types import Group

_OTHER_SEED: Final = 1_000_003  # far from the seeds that people give to runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The batches that were drawn; all of one size."""

    batches: tuple[Collected, ...]
    prompts_per_batch: int

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups."""
        return tuple(group for batch in self.batches for group in batch.groups)


def sample(
    recipe: Recipe,
    opened: Opened,
    reward: RewardSet,
    problems: Splits,
    *,
    groups: int,
    report: Callable[[str], None] = lambda text: None,
) -> Sampled:
    """Draw and score at least ``groups`` groups of the recipe's size.

    Raises:
        ValueError: ``groups`` is below 1.
    """
    if groups < 1:
        raise ValueError(f"groups = {groups}: must be at least 1")
    each = min(recipe.rollout.prompts_per_step, groups)
    objective = recipe.objective.build(max_tokens=recipe.rollout.max_tokens)
    rollouts = Rollouts(
        engine=opened.engine,
        encoder=opened.encoder,
        reward=reward,
        stream=ProblemStream(problems.train, seed=recipe.train.seed + _OTHER_SEED),
        settings=replace(recipe.rollout, filter="keep", prompts_per_step=each, oversample=1.0),
        seed=recipe.train.seed + _OTHER_SEED,
        greedy_baseline=objective.needs_greedy,
        sampler=make_sampler(recipe, opened),
    )
    batches = []
    for done in range(0, groups, each):
        batches.append(rollouts.collect())
        report(f"drawn: {min(done + each, groups)} of {groups} groups")
    return Sampled(batches=tuple(batches), prompts_per_batch=each)
