"""Golden bandits: whole steps on three answers, from rewards to the logits after."""

import torch

from gruppo.objective import (
    Grpo,
    Live,
    Objective,
    PpoClip,
    TokenMean,
    Totals,
    compute_loss,
    make_rows,
    outcome,
)
from gruppo.types import Evidence
from support.golden_loss import assert_matches, ppo, unbiased


def bandit(inputs: dict, objective: Objective, *, steps: int, on_policy: bool):
    """Repeat SGD steps on the four given answers; yields (loss, ratio, grad, logits after)."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    answer = torch.tensor(inputs["completions"])
    rollout = outcome(inputs["rewards"], [0] * len(answer))
    advantage = objective.credit(rollout, Evidence())
    mask = rollout.mask
    old = logits.detach().log_softmax(0)[answer][:, None]
    ref = None
    if "ref_probs" in inputs:
        ref = torch.tensor(inputs["ref_probs"], dtype=torch.float64).log()[answer][:, None]
    rows = make_rows(
        objective,
        advantage=advantage,
        mask=mask,
        group=rollout.group,
        scored=torch.isfinite(rollout.total),
        old_logp=None if on_policy else old,
        engine_logp=None,
        ref_logp=ref,
        totals=Totals.of(mask, rollout.group),
        selected=None,
    )
    optimizer = torch.optim.SGD([logits], lr=inputs["lr"])
    for _ in range(steps):
        live = Live(logp=logits.log_softmax(0)[answer][:, None], entropy=None, mask=mask)
        loss = compute_loss(objective, live, rows, objective.coefficients)
        optimizer.zero_grad()
        loss.value.backward()
        grad = logits.grad.clone()
        optimizer.step()
        yield advantage, loss, grad, logits.detach().clone()


def test_bandit_three_inner_steps(golden) -> None:
    case = golden("e2e/bandit_three_inner_steps")
    inputs = case["inputs"]
    objective = Objective(credit=Grpo(), surrogate=ppo(inputs), weights=TokenMean())
    history = bandit(inputs, objective, steps=inputs["inner_steps"], on_policy=False)
    for got, want in zip(history, case["expected"]["steps"], strict=True):
        advantage, loss, grad, logits = got
        assert_matches(advantage, case["expected"]["advantages"], 1e-6)
        assert_matches(loss.value, want["loss"], 1e-6)
        assert_matches(loss.tokens.ratio[:, 0], want["ratio"], 1e-6)
        assert_matches(grad, want["grad"], 1e-6)
        assert_matches(logits, want["logits_after"], 1e-6)


def test_bandit_with_kl(golden) -> None:
    case = golden("e2e/bandit_with_kl")
    inputs = case["inputs"]
    objective = Objective(
        credit=Grpo(), surrogate=PpoClip(), weights=TokenMean(), kl=unbiased(inputs)
    )
    history = bandit(inputs, objective, steps=inputs["steps"], on_policy=True)
    for got, want in zip(history, case["expected"]["steps"], strict=True):
        advantage, loss, grad, logits = got
        assert_matches(advantage, case["expected"]["advantages"], 1e-6)
        assert_matches(loss.value, want["loss"], 1e-6)
        assert_matches(grad, want["grad"], 1e-6)
        assert_matches(logits, want["logits_after"], 1e-6)
