"""Random optimizer steps, and the loss and gradient of an objective on them."""

from dataclasses import dataclass, replace

import torch
from hypothesis import HealthCheck, Phase, settings

from gruppo.objective import (
    Coefficients,
    Constant,
    Live,
    Loss,
    Objective,
    Rows,
    Totals,
    compute_loss,
    make_rows,
)
from gruppo.types import Rollout

F64 = torch.float64


def quick(examples: int):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """Tensors of an optimizer step, all [B, T] but group [B] and scored [B]."""

    logp: torch.Tensor
    old: torch.Tensor | None
    engine: torch.Tensor | None
    ref: torch.Tensor
    entropy: torch.Tensor
    advantage: torch.Tensor
    mask: torch.Tensor
    group: torch.Tensor
    scored: torch.Tensor


def random_step(seed: int, rows: int = 11, width: int = 7, drift: float = 0.3) -> Step:
    """Random values; some rows without trained tokens, one unscored, group ids in any order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(rows, width, dtype=F64, generator=generator)

    old = -normal(1.5).abs()
    mask = torch.rand(rows, width, generator=generator) < 0.75
    scored = torch.rand(rows, generator=generator) < 0.9
    row_advantage = torch.randn(rows, 1, dtype=F64, generator=generator)
    return Step(
        logp=-(old + normal(drift)).abs(),
        old=old,
        engine=old + normal(drift / 2),
        ref=old + normal(1.0),
        entropy=normal(1.0).abs(),
        advantage=torch.where(scored[:, None], row_advantage, 0).expand(rows, width),
        mask=mask,
        group=torch.randint(0, 3, (rows,), generator=generator),
        scored=scored,
    )


def runnable(objective: Objective) -> Objective:
    """The objective with the one setting that a recipe fills in."""
    if isinstance(objective.weights, Constant):
        return replace(objective, weights=Constant(length=16))
    return objective


def rows_of(objective: Objective, step: Step) -> Rows:
    selected = None
    if objective.select is not None:
        selected = objective.select(
            step.logp,
            step.entropy,
            old_logp=step.logp if step.old is None else step.old,
            advantage=step.advantage,
            mask=step.mask & step.scored[:, None],
            seed=5,
        )
    return make_rows(
        objective,
        advantage=step.advantage,
        mask=step.mask,
        group=step.group,
        scored=step.scored,
        old_logp=step.old,
        engine_logp=step.engine,
        ref_logp=step.ref,
        totals=Totals.of(step.mask, step.group),
        selected=selected,
    )


def rows_for_rollout(objective: Objective, rollout: Rollout, advantage: torch.Tensor) -> Rows:
    """The rows of one on-policy optimizer step over a whole rollout."""
    return make_rows(
        objective,
        advantage=advantage,
        mask=rollout.mask,
        group=rollout.group,
        scored=torch.isfinite(rollout.total),
        old_logp=None,
        engine_logp=None,
        ref_logp=None,
        totals=Totals.of(rollout.mask, rollout.group),
        selected=None,
    )


def evaluate(
    objective: Objective,
    step: Step,
    parts: list[torch.Tensor] | None = None,
    rows: Rows | None = None,
) -> tuple[float, torch.Tensor, list[Loss]]:
    """Sum of losses and gradient [B, T] with respect to logp, over a split of the rows."""
    rows = rows_of(objective, step) if rows is None else rows
    coefficients = Coefficients(kl=objective.coefficients.kl, entropy=0.01)
    gradient, losses = torch.full_like(step.logp, torch.nan), []
    for index in [torch.arange(len(step.mask))] if parts is None else parts:
        logp = step.logp[index].requires_grad_()
        live = Live(logp=logp, entropy=step.entropy[index], mask=step.mask[index])
        loss = compute_loss(objective, live, rows.take(index), coefficients)
        (gradient[index],) = torch.autograd.grad(loss.value, logp)
        losses.append(loss)
    return sum(loss.value.item() for loss in losses), gradient, losses
