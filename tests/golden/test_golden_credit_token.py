"""Golden advantages [B, T]: process rewards, REINFORCE++, GAE, token baselines; and RAE."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gruppo.objective.credit import Process, ReinforcePP, ReinforcePPBaseline, outcome
from gruppo.objective.token import (
    gae,
    optimal_token_baseline,
    rae,
    returns_to_go,
    token_rewards,
    vapo_lambda,
    whiten,
)
from gruppo.types import Evidence

Golden = Callable[[str], dict]


def f64(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def check(actual: torch.Tensor, expected: list, case: dict) -> None:
    torch.testing.assert_close(actual, f64(expected), rtol=0.0, atol=case["tol"])


@pytest.mark.parametrize("name", ["adv/reinforce_pp", "adv/reinforce_pp_gamma0.9"])
def test_reinforce_pp_returns(golden: Golden, name: str) -> None:
    case = golden(name)
    inputs = case["inputs"]
    mask = f64(inputs["mask"]).bool()
    rewards = token_rewards(f64(inputs["scores"]), f64(inputs["kl_k1"]), mask, beta=inputs["beta"])
    if "token_rewards" in case["expected"]:
        check(rewards, case["expected"]["token_rewards"], case)
    returns = returns_to_go(rewards, mask, gamma=inputs["gamma"])
    check(returns, case["expected"]["returns"], case)


@pytest.mark.parametrize(("ddof", "key"), [(0, "population"), (1, "bessel")])
def test_reinforce_pp(golden: Golden, ddof: int, key: str) -> None:
    case = golden("adv/reinforce_pp")
    inputs = case["inputs"]
    mask = f64(inputs["mask"]).bool()
    rollout = outcome(inputs["scores"], [0, 1, 2, 3], mask=mask)
    ref = torch.full(mask.shape, -1.0, dtype=torch.float64)
    evidence = Evidence(old_logp=ref + f64(inputs["kl_k1"]), ref_logp=ref)
    credit = ReinforcePP(beta=inputs["beta"], gamma=inputs["gamma"], ddof=ddof)
    assert credit.needs == {"old_logp", "ref_logp"}
    check(credit(rollout, evidence), case["expected"][f"advantages_{key}"], case)


@pytest.mark.parametrize(("ddof", "key"), [(0, "population"), (1, "bessel")])
def test_reinforce_pp_baseline(golden: Golden, ddof: int, key: str) -> None:
    case = golden("adv/reinforce_pp_baseline")
    inputs = case["inputs"]
    total = [reward for group in inputs["rewards"] for reward in group]
    rollout = outcome(total, inputs["group_ids"], mask=f64(inputs["mask"]).bool())
    advantage = ReinforcePPBaseline(ddof=ddof)(rollout, Evidence())
    check(advantage, case["expected"][f"advantages_{key}"], case)


@pytest.mark.parametrize("name", ["adv/gae_lam1", "adv/gae_lam0.95", "adv/gae_gamma0.9_lam0.8"])
def test_gae(golden: Golden, name: str) -> None:
    case = golden(name)
    inputs, expected = case["inputs"], case["expected"]
    mask = f64(inputs["mask"]).bool()
    advantages, returns = gae(
        f64(inputs["rewards"]),
        f64(inputs["values"]),
        mask,
        gamma=inputs["gamma"],
        lam=inputs["lam"],
    )
    check(advantages, expected["advantages"], case)
    check(returns, expected["returns"], case)
    for ddof, key in ((0, "whitened_population"), (1, "whitened_bessel")):
        if key in expected:
            check(whiten(advantages, mask, ddof=ddof), expected[key], case)


@pytest.mark.parametrize(
    ("ddof", "eps", "key"),
    [(1, 1e-4, "token_advantages"), (0, 0.0, "token_advantages_population_eps0")],
)
def test_process_supervision(golden: Golden, ddof: int, eps: float, key: str) -> None:
    case = golden("adv/process_supervision")
    steps = tuple(
        tuple((step["end"], step["reward"]) for step in row) for row in case["inputs"]["steps"]
    )
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rollout = replace(outcome([1.0, 0.0], [0, 0], mask=mask), steps=steps)
    advantage = Process(ddof=ddof, eps=eps)(rollout, Evidence())
    first, second = case["expected"][key]
    check(advantage, [first, [*second, 0.0]], case)


def test_rae(golden: Golden) -> None:
    case = golden("adv/rae")
    rewards = [float(reward) for reward in case["inputs"]["rewards"]]
    state: dict[str, float] = {}
    for reward, used, wanted in zip(
        rewards, case["expected"]["baseline_used"], case["expected"]["advantages"], strict=True
    ):
        assert state.get("role", 0.0) == pytest.approx(used, abs=case["tol"])
        advantage, state = rae([reward], ["role"], state, decay=case["inputs"]["decay"])
        assert advantage.item() == pytest.approx(wanted, abs=case["tol"])
    assert state["role"] == pytest.approx(case["expected"]["baseline_after"], abs=case["tol"])
    together, after = rae(rewards, ["role"] * 4, {}, decay=case["inputs"]["decay"])
    check(together, case["expected"]["advantages"], case)
    assert after == state


def test_optimal_token_baseline(golden: Golden) -> None:
    case = golden("adv/optimal_token_baseline")
    inputs = case["inputs"]
    advantage = optimal_token_baseline(
        f64(inputs["scores"]),
        f64(inputs["old_logp"]),
        sum_pi2=f64(inputs["sum_pi_squared"]),
        mask=f64(inputs["mask"]).bool(),
        group=torch.tensor(inputs["group_ids"]),
        eps=inputs["eps"],
        zero_tail=inputs["zero_tail"],
    )
    check(advantage, case["expected"]["advantages"], case)


def test_vapo_lambda(golden: Golden) -> None:
    case = golden("cmp/vapo_lambda")
    lam = vapo_lambda(torch.tensor(case["inputs"]["lengths"]), alpha=case["inputs"]["alpha"])
    check(lam, case["expected"]["lam"], case)
