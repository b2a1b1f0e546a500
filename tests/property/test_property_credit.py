"""Credit estimators on random batches: unequal groups, unscored rows, any row order."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gruppo.objective.credit import (
    BatchStd,
    Credit,
    DrGrpo,
    Gdpo,
    Gpg,
    Grpo,
    KLInReward,
    MaxRl,
    Opo,
    PasskAnalytic,
    PasskBest,
    ReinforcePP,
    ReinforcePPBaseline,
    Remax,
    Reweight,
    Rloo,
    combine_parts,
    dead_groups,
    outcome,
)
from gruppo.types import Evidence, Rollout

# The type checker of the tests looks at random items of tuples, also while a rollout is drawn;
# what is drawn does not depend on that.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

NAN = float("nan")
NONE = Evidence()

# Rewards that make trouble: ties, unscored rows, and differences near and below the tolerance.
JITTER = st.sampled_from([0.0, 1e-12, 1e-7, 9e-7, 2e-6, 1e-3])
REWARD = st.one_of(
    st.sampled_from([0.0, 0.5, 1.0, NAN]),
    st.floats(0.0, 10.0),
    st.builds(lambda jitter: 0.1 + jitter, JITTER),
)
GRID = st.one_of(st.just(NAN), st.integers(-32, 32).map(lambda i: i / 8))
BINARY = st.sampled_from([0.0, 1.0, 1.0, NAN])

GROUP = [
    Grpo(),
    Grpo(ddof=0, eps=0.0),
    DrGrpo(),
    Rloo(),
    BatchStd(of="rewards"),
    BatchStd(of="advantages", ddof=0),
    Gpg(f_norm=2.0),
    MaxRl(),
    Opo(),
    Gdpo(),
    PasskBest(),
    PasskBest(std=False),
]
TOKEN = [ReinforcePP(), ReinforcePP(gamma=0.9, ddof=1), ReinforcePPBaseline()]


@st.composite
def batches(draw: st.DrawFn, reward: st.SearchStrategy[float] = REWARD) -> Rollout:
    """1 to 4 groups of 1 to 6 rows in a random order, with masks that may be empty."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    group = draw(st.permutations([g for g, size in enumerate(sizes) for _ in range(size)]))
    total = draw(st.lists(reward, min_size=len(group), max_size=len(group)))
    width = draw(st.integers(0, 3))
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    mask = torch.tensor(draw(st.lists(row, min_size=len(group), max_size=len(group)))).bool()
    mask = mask.reshape(len(group), width)
    rollout = outcome(total, group, mask=mask, baseline=[0.5] * len(sizes))
    second = torch.tensor(draw(st.lists(reward, min_size=len(group), max_size=len(group))))
    return replace(
        rollout,
        length=torch.arange(len(group)) % 4,
        parts=torch.stack([rollout.total, second.double()], 1),
        part_names=("first", "second"),
        part_weights=torch.tensor([1.0, 0.5], dtype=torch.float64),
    )


def take(rollout: Rollout, order: torch.Tensor) -> Rollout:
    """Some of the rows, in another order."""
    part = outcome(
        rollout.total[order].tolist(),
        rollout.group[order].tolist(),
        mask=rollout.mask[order],
        baseline=[0.5] * 4,
    )
    return replace(
        part,
        length=rollout.length[order],
        parts=rollout.parts[order],
        part_names=rollout.part_names,
        part_weights=rollout.part_weights,
    )


def sums(advantage: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    return torch.zeros(4, dtype=torch.float64).index_add(0, rollout.group, advantage)


def is_dead(values: list[float]) -> bool:
    scored = [value for value in values if not math.isnan(value)]
    return len(scored) < 2 or max(scored) - min(scored) <= 1e-6


@given(rollout=batches())
@settings(max_examples=30, deadline=None)
def test_centred_estimators_sum_to_zero_in_each_group(rollout: Rollout) -> None:
    for credit in [c for c in GROUP if c.centred]:
        advantage = credit(rollout, NONE)
        scale = 1.0 + advantage.abs().max().item()
        assert sums(advantage, rollout).abs().max().item() <= 1e-12 * scale


@given(rollout=batches())
@settings(max_examples=100, deadline=None)
def test_dead_groups_is_what_it_says(rollout: Rollout) -> None:
    groups = [rollout.total[rollout.group == g].tolist() for g in range(len(rollout.prompts))]
    assert dead_groups(rollout.total, rollout.group).tolist() == [is_dead(g) for g in groups]


@given(rollout=batches())
@settings(max_examples=30, deadline=None)
def test_dead_groups_get_exactly_zero(rollout: Rollout) -> None:
    dead = dead_groups(rollout.total, rollout.group)[rollout.group]
    for credit in [*GROUP, ReinforcePPBaseline()]:
        advantage = credit(rollout, NONE)
        assert torch.isfinite(advantage).all(), credit
        # GDPO tells apart parts whose sums agree: its dead groups are those of the parts.
        if not isinstance(credit, Gdpo):
            assert advantage[dead].abs().sum().item() == 0.0, credit


@given(rollout=batches())
@settings(max_examples=15, deadline=None)
def test_unscored_rows_get_zero_and_move_nothing(rollout: Rollout) -> None:
    for credit in [*GROUP, *TOKEN, Remax()]:
        scored = torch.isfinite(rollout.total)
        advantage = credit(rollout, NONE)
        assert advantage[~scored].abs().sum().item() == 0.0
        without = credit(take(rollout, scored.nonzero()[:, 0]), NONE)
        torch.testing.assert_close(advantage[scored], without, rtol=1e-9, atol=1e-12)


@given(rollout=batches(), data=st.data())
@settings(max_examples=15, deadline=None)
def test_row_order_does_not_matter(rollout: Rollout, data: st.DataObject) -> None:
    for credit in [*GROUP, *TOKEN, Remax()]:
        order = torch.tensor(data.draw(st.permutations(range(len(rollout.group)))))
        shuffled = credit(take(rollout, order), NONE)
        torch.testing.assert_close(shuffled, credit(rollout, NONE)[order], rtol=1e-9, atol=1e-9)


@given(rollout=batches(GRID), shift=st.integers(-64, 64))
@settings(max_examples=30, deadline=None)
def test_shift_invariance(rollout: Rollout, shift: int) -> None:
    shifted = replace(rollout, total=rollout.total + shift / 8)
    for credit in [Grpo(), Grpo(ddof=0, eps=0.0), DrGrpo(), Rloo(), BatchStd(), Gpg(), PasskBest()]:
        moved = credit(shifted, NONE)
        torch.testing.assert_close(moved, credit(rollout, NONE), rtol=0.0, atol=1e-11)
    filled = replace(rollout, length=rollout.length + 1)  # empty groups of Opo have no baseline
    moved = Opo()(replace(filled, total=shifted.total), NONE)
    torch.testing.assert_close(moved, Opo()(filled, NONE), rtol=0.0, atol=1e-11)


@given(rollout=batches(GRID), power=st.integers(-3, 6))
@settings(max_examples=25, deadline=None)
def test_scale_equivariance_without_std(rollout: Rollout, power: int) -> None:
    for credit in [DrGrpo(), Rloo(), Gpg(), Opo(), PasskBest(std=False)]:
        scaled = credit(replace(rollout, total=rollout.total * 2.0**power), NONE)
        torch.testing.assert_close(scaled, credit(rollout, NONE) * 2.0**power, rtol=0.0, atol=0.0)


@given(rollout=batches(GRID), scale=st.floats(0.5, 50.0))
@settings(max_examples=30, deadline=None)
def test_scale_invariance_with_std(rollout: Rollout, scale: float) -> None:
    positive = replace(rollout, total=rollout.total.abs())
    larger = replace(positive, total=positive.total * scale)
    batch = [BatchStd(of="rewards", eps=0.0), BatchStd(of="advantages", eps=0.0)]
    for credit in [Grpo(eps=0.0), PasskBest(eps=0.0), MaxRl(), *batch]:
        scaled = credit(larger, NONE)
        torch.testing.assert_close(scaled, credit(positive, NONE), rtol=1e-9, atol=1e-11)


@given(rollout=batches(), ddof=st.sampled_from([0, 1]), eps=st.sampled_from([0.0, 1e-9, 1e-4]))
@settings(max_examples=100, deadline=None)
def test_grpo_is_bounded_however_small_the_spread(rollout: Rollout, ddof: int, eps: float) -> None:
    advantage = Grpo(ddof=ddof, eps=eps)(rollout, NONE)
    for g in range(len(rollout.prompts)):
        rows = rollout.group == g
        size = max(int(torch.isfinite(rollout.total[rows]).sum()), 1)
        bound = (size - 1) / math.sqrt(size) if ddof else math.sqrt(size - 1)
        assert advantage[rows].abs().max().item() <= bound * (1.0 + 1e-9)


@given(rollout=batches(GRID))
@settings(max_examples=40, deadline=None)
def test_grpo_and_rloo_equal_their_definitions(rollout: Rollout) -> None:
    grpo, rloo = Grpo(eps=1e-4)(rollout, NONE), Rloo()(rollout, NONE)
    for row, reward in enumerate(rollout.total.tolist()):
        siblings = rollout.total[rollout.group == rollout.group[row]].tolist()
        scored = [value for value in siblings if not math.isnan(value)]
        if math.isnan(reward) or is_dead(siblings):
            continue
        wanted = (reward - statistics.mean(scored)) / (statistics.stdev(scored) + 1e-4)
        assert grpo[row].item() == pytest.approx(wanted, abs=1e-12)
        others = (sum(scored) - reward) / (len(scored) - 1)
        assert rloo[row].item() == pytest.approx(reward - others, abs=1e-12)


@given(rollout=batches(GRID))
@settings(max_examples=40, deadline=None)
def test_energy_of_a_live_group(rollout: Rollout) -> None:
    energy = sums(Grpo(eps=0.0)(rollout, NONE).square(), rollout)
    for g in range(len(rollout.prompts)):
        values = rollout.total[rollout.group == g].tolist()
        size = sum(not math.isnan(value) for value in values)
        wanted = 0.0 if is_dead(values) else size - 1
        assert energy[g].item() == pytest.approx(wanted, abs=1e-9)


def mean_over_subsets(right: list[float], k: int) -> list[float]:
    """Row advantage by brute force: the mean over all k-subsets that contain the row."""
    subsets = list(itertools.combinations(range(len(right)), k))
    score = [max(right[i] for i in subset) for subset in subsets]
    mean, std = statistics.mean(score), statistics.pstdev(score)
    if std == 0.0:
        return [0.0] * len(right)
    return [
        statistics.mean(
            (s - mean) / std for s, subset in zip(score, subsets, strict=True) if i in subset
        )
        for i in range(len(right))
    ]


@given(rollout=batches(BINARY), k=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_passk_analytic_is_the_mean_over_subsets(rollout: Rollout, k: int) -> None:
    advantage = PasskAnalytic(k=k)(rollout, NONE)
    assert sums(advantage, rollout).abs().max().item() <= 1e-12
    for g in range(len(rollout.prompts)):
        rows = (rollout.group == g) & torch.isfinite(rollout.total)
        right = rollout.total[rows].tolist()
        wanted = mean_over_subsets(right, k) if len(right) >= k else [0.0] * len(right)
        assert advantage[rows].tolist() == pytest.approx(wanted, abs=1e-9)


def test_passk_analytic_survives_huge_binomials() -> None:
    # C(1000, 500) has 300 digits; with one right row F = 1/2 exactly, so A+ = 1.
    rollout = outcome([1.0] + [0.0] * 999, [0] * 1000)
    advantage = PasskAnalytic(k=500)(rollout, NONE)
    assert advantage[0].item() == pytest.approx(1.0, abs=1e-9)
    assert advantage[1:].tolist() == pytest.approx([-1.0 / 999] * 999, abs=1e-12)


@given(rollout=batches())
@settings(max_examples=40, deadline=None)
def test_gdpo_with_one_part_is_grpo_up_to_scale(rollout: Rollout) -> None:
    single = replace(rollout, parts=rollout.parts[:, :1], part_weights=torch.ones(1).double())
    total = combine_parts(single.parts, single.part_weights)
    torch.testing.assert_close(total, rollout.total, rtol=0.0, atol=0.0, equal_nan=True)
    grpo = Grpo()(rollout, NONE)
    gdpo = Gdpo()(single, NONE)
    scored = grpo[torch.isfinite(rollout.total)]
    scale = statistics.stdev(scored.tolist()) + 1e-4 if len(scored) > 1 else 1.0
    torch.testing.assert_close(gdpo, grpo / scale, rtol=1e-9, atol=1e-9)


@given(rollout=batches(GRID), beta=st.sampled_from([0.0, 0.125, 1.0]), data=st.data())
@settings(max_examples=40, deadline=None)
def test_kl_in_reward_lowers_the_reward_by_the_trained_sum(
    rollout: Rollout, beta: float, data: st.DataObject
) -> None:
    shape = rollout.mask.shape
    cells = st.lists(st.integers(-8, 8), min_size=shape.numel(), max_size=shape.numel())
    k1 = torch.tensor(data.draw(cells), dtype=torch.float64).reshape(shape) / 8
    evidence = Evidence(old_logp=k1 - 2.0, ref_logp=torch.full(shape, -2.0).double())
    penalised = rollout.total - beta * (k1 * rollout.mask).sum(1)
    expected = Rloo()(replace(rollout, total=penalised), NONE)
    actual = KLInReward(credit=Rloo(), beta=beta)(rollout, evidence)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


@given(rollout=batches(GRID), clip=st.sampled_from([None, 0.25, 1.0]))
@settings(max_examples=40, deadline=None)
def test_reweight_limits_then_scales_each_sign(rollout: Rollout, clip: float | None) -> None:
    plain = DrGrpo()(rollout, NONE)
    credit = Reweight(credit=DrGrpo(), clip=clip, pos_scale=2.0, neg_scale=0.1)
    for before, after in zip(plain.tolist(), credit(rollout, NONE).tolist(), strict=True):
        limit = math.inf if clip is None else clip
        wanted = min(before, limit) * 2.0 if before > 0 else max(before, -limit) * 0.1
        assert after == wanted


@pytest.mark.parametrize("credit", [*GROUP, *TOKEN, Remax(), PasskAnalytic(k=2)], ids=repr)
@pytest.mark.parametrize(
    ("total", "group"),
    [([], []), ([1.0], [0]), ([NAN, NAN], [0, 0]), ([NAN, 1.0], [0, 0]), ([1.0, 0.0], [0, 1])],
    ids=["empty", "one_row", "all_unscored", "one_scored", "groups_of_one"],
)
def test_degenerate_batches(credit: Credit, total: list[float], group: list[int]) -> None:
    mask = torch.zeros(len(total), 1, dtype=torch.bool)
    rollout = outcome(total, group, mask=mask, baseline=[0.0] * len(set(group)))
    advantage = credit(rollout, NONE)
    assert advantage.shape[0] == len(total)
    wanted = sum(reward for reward in total if not math.isnan(reward))
    # Only the greedy baseline (0 here) says anything about a single row.
    assert advantage.sum().item() == (wanted if isinstance(credit, Remax) else 0.0)
