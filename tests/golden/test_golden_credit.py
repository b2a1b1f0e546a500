"""Golden advantages [B]: group estimators, pass@k, several rewards, edge cases."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gruppo.objective.credit import (
    BatchStd,
    Credit,
    DrGrpo,
    Gdpo,
    Gpg,
    Grpo,
    MaxRl,
    Opo,
    PasskAnalytic,
    PasskBest,
    Remax,
    Rloo,
    combine_parts,
    dead_groups,
    outcome,
)
from gruppo.objective.credit_group import gpg_alpha, length_weighted_mean
from gruppo.objective.theory import dead_probability
from gruppo.types import Evidence, Rollout

Golden = Callable[[str], dict]
NONE = Evidence()


def number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def rows(groups: list[list[float | None]], baseline: list[float] | None = None) -> Rollout:
    """Rollout of a [P][G] table of rewards."""
    total = [number(reward) for group in groups for reward in group]
    ids = [p for p, group in enumerate(groups) for _ in group]
    return outcome(total, ids, baseline=baseline)


def check(actual: torch.Tensor, expected: list, case: dict) -> None:
    """Equal to a [P][G] table, to the case's tolerance; advantages are float64."""
    wanted = torch.tensor([number(v) for group in expected for v in group], dtype=torch.float64)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, wanted, rtol=0.0, atol=case["tol"], equal_nan=True)


GROUP_CASES = [
    ("adv/grpo", Grpo(ddof=1, eps=1e-4)),
    ("adv/grpo_population_std", Grpo(ddof=0, eps=1e-4)),
    ("adv/grpo_eps1e-6_verl", Grpo(ddof=1, eps=1e-6)),
    ("adv/grpo_real_rewards_G8", Grpo()),
    ("adv/dr_grpo", DrGrpo()),
    ("adv/rloo", Rloo()),
    ("adv/batch_std_rewards", BatchStd(of="rewards")),
    ("adv/batch_std_advantages", BatchStd(of="advantages")),
    ("adv/gpg", Gpg(f_norm=1.0)),
    ("adv/maxrl", MaxRl()),
    ("adv/edge_zero_variance", Grpo()),
    ("adv/edge_G1", Grpo()),
    ("adv/edge_nan_reward", Grpo()),
    ("adv/passk_best", PasskBest(std=True)),
    ("adv/passk_analytic_k1", PasskAnalytic(k=1)),
    ("adv/passk_analytic_k2", PasskAnalytic(k=2)),
    ("adv/passk_analytic_k4", PasskAnalytic(k=4)),
]


@pytest.mark.parametrize(("name", "credit"), GROUP_CASES, ids=[c[0] for c in GROUP_CASES])
def test_group_estimator(golden: Golden, name: str, credit: Credit) -> None:
    case = golden(name)
    rollout = rows(case["inputs"]["rewards"])
    check(credit(rollout, NONE), case["expected"]["advantages"], case)


@pytest.mark.parametrize(("name", "credit"), GROUP_CASES, ids=[c[0] for c in GROUP_CASES])
def test_rows_in_reverse_order(golden: Golden, name: str, credit: Credit) -> None:
    case = golden(name)
    rollout = rows(case["inputs"]["rewards"])
    mirrored = replace(rollout, total=rollout.total.flip(0), group=rollout.group.flip(0))
    check(credit(mirrored, NONE).flip(0), case["expected"]["advantages"], case)


def test_gpg_alpha(golden: Golden) -> None:
    case = golden("adv/gpg")
    rollout = rows(case["inputs"]["rewards"])
    assert gpg_alpha(rollout.total, rollout.group) == case["expected"]["alpha"]
    halved = Gpg(f_norm=2.0)(rollout, NONE)
    check(2.0 * halved, case["expected"]["advantages"], case)


def test_remax(golden: Golden) -> None:
    case = golden("adv/remax")
    rollout = rows(case["inputs"]["rewards"], baseline=case["inputs"]["greedy_rewards"])
    check(Remax()(rollout, NONE), case["expected"]["advantages"], case)


def test_opo(golden: Golden) -> None:
    case = golden("adv/opo")
    length = torch.tensor(case["inputs"]["lengths"]).flatten()
    rollout = replace(rows(case["inputs"]["rewards"]), length=length)
    baseline = length_weighted_mean(rollout.total, length, rollout.group)
    check(baseline, [case["expected"]["baselines"]], case)
    check(Opo()(rollout, NONE), case["expected"]["advantages"], case)


def several(case: dict) -> Rollout:
    """Rollout of a [K][P][G] table of reward functions."""
    tables, weights = case["inputs"]["rewards_per_function"], case["inputs"]["weights"]
    columns = [[number(v) for group in table for v in group] for table in tables]
    parts = torch.tensor(columns, dtype=torch.float64).T
    part_weights = torch.tensor(weights, dtype=torch.float64)
    rollout = rows(tables[0])
    return replace(
        rollout,
        total=combine_parts(parts, part_weights),
        parts=parts,
        part_weights=part_weights,
        part_names=tuple(f"part{k}" for k in range(len(weights))),
    )


def test_gdpo(golden: Golden) -> None:
    case = golden("adv/gdpo")
    credit = Gdpo(ddof=case["inputs"]["ddof"], eps=case["inputs"]["eps"])
    check(credit.weighted(several(case)), case["expected"]["before_batch_norm"], case)
    check(credit(several(case), NONE), case["expected"]["advantages"], case)


@pytest.mark.parametrize(
    "name", ["adv/multi_reward_sum_then_normalize", "adv/edge_multi_reward_nan"]
)
def test_sum_of_rewards_then_normalised(golden: Golden, name: str) -> None:
    case = golden(name)
    rollout = several(case)
    check(rollout.total, case["expected"]["total"], case)
    check(Grpo()(rollout, NONE), case["expected"]["advantages"], case)


def test_passk_best_without_std(golden: Golden) -> None:
    case = golden("adv/passk_best")
    advantage = PasskBest(std=False)(rows(case["inputs"]["rewards"]), NONE)
    check(advantage, case["expected"]["advantages_no_std"], case)


def test_unscored_rows(golden: Golden) -> None:
    case = golden("adv/edge_nan_reward")
    rollout = rows(case["inputs"]["rewards"])
    check(Rloo()(rollout, NONE), case["expected"]["advantages_rloo"], case)
    scored = torch.isfinite(rollout.total).reshape(3, 4).sum(1)
    assert scored.tolist() == case["expected"]["scored"]
    assert dead_groups(rollout.total, rollout.group).tolist() == [n < 2 for n in scored.tolist()]


def test_dead_groups(golden: Golden) -> None:
    case = golden("adv/edge_zero_variance")
    rollout = rows(case["inputs"]["rewards"])
    assert dead_groups(rollout.total, rollout.group).tolist() == case["expected"]["dead"]
    assert Grpo()(rollout, NONE).abs().max().item() == 0.0


def test_a_single_winner_reaches_the_bound(golden: Golden) -> None:
    case = golden("adv/bound_one_winner")
    for ddof, name in ((0, "population_max"), (1, "bessel_max")):
        for size, bound in zip(case["inputs"]["G"], case["expected"][name], strict=True):
            advantage = Grpo(ddof=ddof, eps=0.0)(rows([[1.0] + [0.0] * (size - 1)]), NONE)
            assert advantage.abs().max().item() == pytest.approx(bound, abs=case["tol"])


@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-4])
def test_float32_noise_is_no_advantage(golden: Golden, eps: float) -> None:
    case = golden("adv/pitfall_float32_dead_group")
    rollout = rows(case["inputs"]["rewards"])
    advantage = Grpo(eps=eps)(replace(rollout, total=rollout.total.float()), NONE)
    assert advantage.tolist() == case["expected"]["ours"][0]


def test_rloo_is_scaled_dr_grpo(golden: Golden) -> None:
    case = golden("cmp/rloo_equals_scaled_dr_grpo")
    rollout = rows(case["inputs"]["rewards"])
    check(Rloo()(rollout, NONE), case["expected"]["rloo"], case)
    check(DrGrpo()(rollout, NONE) * 4 / 3, case["expected"]["dr_grpo_times_G_over_Gm1"], case)


def test_dead_probability(golden: Golden) -> None:
    case = golden("group/dead_probability")
    for p, expected in zip(case["inputs"]["p"], case["expected"]["dead"], strict=True):
        for size, wanted in zip(case["inputs"]["G"], expected, strict=True):
            assert dead_probability(p, size) == pytest.approx(wanted, abs=case["tol"])
