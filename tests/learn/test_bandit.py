"""Every preset must solve a bandit with three answers, and must fail it with the sign flipped.

One prompt, one-token answers, a softmax over three logits as the policy. Answer 0 is right. The
harness is a whole training loop in small: it draws fresh samples, scores them, gathers the
evidence that the objective asks for, and takes one optimizer step.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from gruppo.objective import (
    PRESETS,
    Coefficients,
    Constant,
    Live,
    Objective,
    Preset,
    Totals,
    compute_loss,
    make_rows,
)
from gruppo.types import Evidence, Rollout

NUM_SAMPLES = 16
NUM_STEPS = 80
F64 = torch.float64

pytestmark = pytest.mark.usefixtures("unchecked")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Answers of one step with everything a credit may ask for."""

    rollout: Rollout
    evidence: Evidence


def draw(
    logits: torch.Tensor, group_size: int, generator: torch.Generator, *, taste: float
) -> Drawn:
    """Fresh answers in groups; the reference is the uniform start policy.

    ``taste`` scales a grader's small random preference, added to the reward.
    """
    logp = logits.detach().log_softmax(0)
    answer = torch.multinomial(logp.exp(), NUM_SAMPLES, replacement=True, generator=generator)
    right = (answer == 0).to(F64)
    total = right + taste * torch.rand(NUM_SAMPLES, dtype=F64, generator=generator)
    num_groups, mask = NUM_SAMPLES // group_size, torch.ones(NUM_SAMPLES, 1, dtype=torch.bool)
    rollout = Rollout(
        prompts=((0,),) * num_groups,
        tokens=answer[:, None],
        mask=mask,
        engine_logp=logp[answer][:, None],
        group=torch.arange(NUM_SAMPLES) // group_size,
        total=total,
        task=right,
        parts=torch.stack([right, total - right], dim=1),
        part_names=("right", "taste"),
        part_weights=torch.tensor([1.0, 1.0], dtype=F64),
        length=torch.ones(NUM_SAMPLES, dtype=torch.int64),
        truncated=torch.zeros(NUM_SAMPLES, dtype=torch.bool),
        steps=tuple(((1, value),) for value in total.tolist()),
        baseline=torch.full((num_groups,), float(logp.argmax() == 0), dtype=F64),
    )
    evidence = Evidence(
        old_logp=logp[answer][:, None],
        ref_logp=torch.full((NUM_SAMPLES, 1), 1 / 3, dtype=F64).log(),
    )
    return Drawn(rollout=rollout, evidence=evidence)


def loss_of(
    objective: Objective, logits: torch.Tensor, drawn: Drawn, alpha: float, sign: float
) -> tuple[torch.Tensor, float]:
    """The step's loss and the policy's entropy."""
    rollout, evidence = drawn.rollout, drawn.evidence
    advantage = sign * objective.credit(rollout, evidence)
    logp = logits.log_softmax(0)
    entropy = -(logp.exp() * logp).sum()
    live = Live(
        logp=logp[rollout.tokens[:, 0]][:, None],
        entropy=entropy.expand(NUM_SAMPLES, 1),
        mask=rollout.mask,
    )
    selected = None
    if objective.select is not None:
        selected = objective.select(
            live.logp.detach(),
            live.entropy,
            old_logp=live.logp.detach(),
            advantage=advantage.view(NUM_SAMPLES, -1),
            mask=rollout.mask,
            seed=0,
        )
    rows = make_rows(
        objective,
        advantage=advantage,
        mask=rollout.mask,
        group=rollout.group,
        scored=torch.isfinite(rollout.total),
        old_logp=evidence.old_logp if objective.needs_old(1) else None,
        engine_logp=rollout.engine_logp,
        ref_logp=evidence.ref_logp if objective.needs_reference else None,
        totals=Totals.of(rollout.mask, rollout.group),
        selected=selected,
    )
    coefficients = Coefficients(kl=objective.coefficients.kl, entropy=alpha)
    return compute_loss(objective, live, rows, coefficients).value, entropy.item()


def train(name: str, *, sign: float, seed: int) -> float:
    """Probability of the right answer after at most NUM_STEPS steps."""
    preset: Preset = PRESETS[name]
    objective = preset.objective
    if isinstance(objective.weights, Constant):
        objective = replace(objective, weights=Constant(length=1))
    group_size = preset.rollout.get("group_size", 8)
    assert isinstance(group_size, int)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(3, dtype=F64, requires_grad=True)
    # Equal rewards give the credit of the best-of-group kind nothing to tell apart.
    taste = 0.01 if name == "passk_best" else 0.0
    optimizer: torch.optim.Optimizer = torch.optim.SGD([logits], lr=2.0)
    if name.startswith("passk"):
        # Their credit fades once a group has several right answers; Adam undoes the scale.
        optimizer = torch.optim.Adam([logits], lr=0.3)
    alpha = objective.coefficients.entropy
    control = None if objective.entropy is None else objective.entropy.adaptive
    state = alpha if control is None else control.start(0.0)[0]
    for _ in range(NUM_STEPS):
        drawn = draw(logits, group_size, generator, taste=taste)
        loss, entropy = loss_of(objective, logits, drawn, alpha, sign)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if control is not None:
            state, alpha = control(state, entropy, NUM_SAMPLES)
        right = logits.detach().softmax(0)[0].item()
        if right > 0.97 or right < 0.1:
            break
    return right


@pytest.mark.parametrize("name", PRESETS)
def test_preset_solves_the_bandit(name: str) -> None:
    assert train(name, sign=1.0, seed=1) > 0.95


@pytest.mark.parametrize("name", PRESETS)
def test_flipped_advantages_unlearn_it(name: str) -> None:
    assert train(name, sign=-1.0, seed=1) < 0.2
