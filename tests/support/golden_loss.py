"""From a golden case's inputs to its loss record and gradient."""

import torch

from gruppo.objective import (
    KLNaive,
    KLTerm,
    KLUnbiased,
    Live,
    Objective,
    PpoClip,
    Totals,
    compute_loss,
    make_rows,
)


def ppo(i: dict, **options: float) -> PpoClip:
    return PpoClip(eps_low=i["eps_low"], eps_high=i["eps_high"], **options)


def unbiased(i: dict) -> KLTerm:
    assert (i["kl"], i["kl_grad"]) == ("k3", "unbiased_is")
    return KLTerm(beta=i["beta"], estimator=KLUnbiased())


def naive(i: dict) -> KLTerm:
    assert (i["kl"], i["kl_grad"]) == ("k3", "naive")
    return KLTerm(beta=i["beta"], estimator=KLNaive())


def optional(inputs: dict, dtype: torch.dtype, *names: str) -> torch.Tensor | None:
    for name in names:
        if name in inputs:
            return torch.tensor(inputs[name], dtype=dtype)
    return None


def required(inputs: dict, dtype: torch.dtype, *names: str) -> torch.Tensor:
    found = optional(inputs, dtype, *names)
    assert found is not None, names
    return found


def run(objective: Objective, inputs: dict, dtype: torch.dtype = torch.float64):
    """Loss record and gradient with respect to logp, for one golden case's inputs."""
    mask = required(inputs, dtype, "mask").bool()
    group = torch.tensor(inputs.get("group_ids", [0] * len(mask)))
    logp = required(inputs, dtype, "logp").requires_grad_()
    entropy = optional(inputs, dtype, "entropy")
    old = optional(inputs, dtype, "prox_logp", "old_logp")
    advantage = required(inputs, dtype, "token_advantages", "advantages")
    selected = None
    if objective.select is not None:
        selected = objective.select(
            logp.detach(),
            entropy,
            old_logp=old,
            advantage=advantage[:, None].expand(mask.shape),
            mask=mask,
            seed=0,
        )
    rows = make_rows(
        objective,
        advantage=advantage,
        mask=mask,
        group=group,
        scored=torch.ones(len(mask), dtype=torch.bool),
        old_logp=old,
        engine_logp=optional(inputs, dtype, "behav_logp", "rollout_logp"),
        ref_logp=optional(inputs, dtype, "ref_logp"),
        totals=Totals.of(mask, group),
        selected=selected,
    )
    live = Live(logp=logp, entropy=entropy, mask=mask)
    loss = compute_loss(objective, live, rows, objective.coefficients)
    loss.value.backward()
    return loss, logp.grad


def assert_matches(actual: torch.Tensor, expected: object, tol: float) -> None:
    wanted = torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), wanted, atol=tol, rtol=0)
