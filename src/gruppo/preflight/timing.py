"""What a step takes: drawing and scoring as measured, the update from a part of one, by tokens.

The weights move a little while it measures; nothing is kept of that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch

from gruppo.objective import LocalTokenMean, Objective
from gruppo.policy import Policy
from gruppo.preflight.sampling import Sampled
from gruppo.recipe import Recipe
from gruppo.recipe.build import Parts
from gruppo.rollout import tensorise
from gruppo.types import Group, Rollout
from gruppo.update import OptimizerStep, Targets, gather_evidence

_ONCE_S: Final = 20.0  # an update that takes longer is not measured a second time


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one step, by what is done; and of a token, for what-if."""

    sampling: float
    scoring: float
    evidence: float
    update: float
    optimizer: float
    per_drawn_token: float
    per_trained_token: float
    batches: float

    @property
    def step(self) -> float:
        """Seconds of a whole step."""
        return self.sampling + self.scoring + self.evidence + self.update + self.optimizer

    def seconds(self) -> dict[str, float]:
        """By phase, as ``gruppo bench`` names them."""
        return {
            "sampling": self.sampling,
            "scoring": self.scoring,
            "evidence": self.evidence,
            "forward_backward": self.update,
            "optimizer": self.optimizer,
            "step": self.step,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """Seconds of what was measured, and of how many positions."""

    evidence: float
    passes: float
    optimizer: float
    positions: int


def positions(groups: Sequence[Group], *, packed: bool) -> int:
    """Tokens that go forward: a prompt once for its group, or with every completion."""
    return sum(
        len(group.prompt_tokens) * (1 if packed else len(group.completions))
        + sum(len(completion.tokens) for completion in group.completions)
        for group in groups
    )


def skips_dead(recipe: Recipe, objective: Objective) -> bool:
    """Whether groups without a signal are left out of the training passes."""
    if recipe.rollout.filter in ("drop", "resample"):
        return True
    whole = objective.kl is not None or objective.entropy is not None
    whole |= objective.select is not None or objective.acts_without_advantage
    whole |= isinstance(objective.weights, LocalTokenMean)  # they count its tokens
    return recipe.rollout.filter == "skip" and not whole


def draws_per_step(recipe: Recipe, live: float) -> float:
    """How many batches of prompts a step draws: above 1 where dead groups are replaced."""
    if recipe.rollout.filter != "resample":
        return 1.0
    return min(1 / max(live, 1e-9), float(recipe.rollout.max_gen_batches))


def measure_timing(recipe: Recipe, parts: Parts, sampled: Sampled) -> Timing:
    """Time a step of ``recipe`` on the batches of ``sampled``."""
    rollout, train = recipe.rollout, recipe.train
    groups, packed = sampled.groups, parts.policy.packed
    used = _measured(groups, sampled.prompts_per_batch, train.tokens_per_microbatch, packed)
    found = _measure(recipe, parts, used)
    live = sum(group.is_live(rollout.filter_metric) for group in groups) / len(groups)
    draws = draws_per_step(recipe, live)
    scale = rollout.prompts_per_step / sampled.prompts_per_batch
    trained = scale * positions(groups, packed=packed) / len(sampled.batches)
    if skips_dead(recipe, parts.objective) and rollout.filter != "resample":
        alive = [g for g in groups if g.is_live("total")]
        trained *= positions(alive, packed=packed) / positions(groups, packed=packed)
    each = found.passes / found.positions
    sampling = statistics.median(b.seconds_sampling for b in sampled.batches)
    drawn = sum(len(c.tokens) for g in groups for c in g.completions) / len(sampled.batches)
    full = scale * positions(groups, packed=packed) / len(sampled.batches)
    return Timing(
        sampling=sampling * scale * draws,
        scoring=statistics.median(b.seconds_scoring for b in sampled.batches) * scale * draws,
        evidence=found.evidence / found.positions * full,
        update=each * trained * train.inner_epochs,
        optimizer=found.optimizer * train.inner_epochs * train.minibatches,
        per_drawn_token=sampling / max(drawn, 1.0),
        per_trained_token=each * train.inner_epochs,
        batches=draws,
    )


def _measured(groups: Sequence[Group], most: int, budget: int, packed: bool) -> tuple[Group, ...]:
    """A step's groups, or as many as fill two micro-batches."""
    chosen: list[Group] = []
    for group in groups[:most]:
        chosen.append(group)
        if positions(chosen, packed=packed) > 2 * budget:
            break
    return tuple(chosen)


def _measure(recipe: Recipe, parts: Parts, groups: Sequence[Group]) -> _Update:
    policy: Policy = parts.policy
    rollout = tensorise(
        groups,
        parts.reward,
        recipe.rollout,
        greedy_baseline=parts.rollouts.greedy_baseline,
    )
    found = _once(recipe, parts, rollout, groups)
    if found.passes < _ONCE_S:  # the first time, kernels are chosen and moments made
        found = _once(recipe, parts, rollout, groups)
    parts.opened.engine.load(None, policy.version)
    return found


def _once(recipe: Recipe, parts: Parts, rollout: Rollout, groups: Sequence[Group]) -> _Update:
    policy, objective = parts.policy, parts.objective
    how = recipe.train.update(skip_dead=False)
    clock = [time.perf_counter()]
    evidence = gather_evidence(policy, objective, rollout, how)
    clock.append(time.perf_counter())
    advantage = objective.credit(rollout, evidence)
    targets = Targets(rollout=rollout, evidence=evidence, advantage=advantage)
    step = OptimizerStep(policy, objective, targets, objective.coefficients, how)
    step.accumulate(torch.arange(len(rollout.group)), first=True)
    clock.append(time.perf_counter())
    policy.step()
    clock.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(clock)]
    return _Update(
        evidence=seconds[0],
        passes=seconds[1],
        optimizer=seconds[2],
        positions=positions(groups, packed=policy.packed),
    )
