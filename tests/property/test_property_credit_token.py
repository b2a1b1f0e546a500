"""Returns, GAE, whitening, process rewards and token baselines on random masked rows."""

import math
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gruppo.objective.credit import Process, ReinforcePP, ReinforcePPBaseline, outcome
from gruppo.objective.token import gae, optimal_token_baseline, returns_to_go, whiten
from gruppo.types import Evidence

Table = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Rewards, values and a mask [B, T]; rows may be empty, and T may be 0."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(0, 6)))
    count = math.prod(shape)
    numbers = st.lists(st.integers(-16, 16), min_size=count, max_size=count)
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    rewards = torch.tensor(draw(numbers), dtype=torch.float64).reshape(shape) / 8
    values = torch.tensor(draw(numbers), dtype=torch.float64).reshape(shape) / 8
    return rewards, values, torch.tensor(draw(flags)).reshape(shape).bool()


@given(table=tables(), gamma=st.sampled_from([0.5, 1.0]), lam=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=50, deadline=None)
def test_gae_is_the_discounted_sum_of_errors(table: Table, gamma: float, lam: float) -> None:
    rewards, values, mask = table
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    wanted = torch.zeros_like(rewards)
    for b in range(mask.shape[0]):
        steps = mask[b].nonzero()[:, 0].tolist()  # a hole does not exist for the recursion
        v = [values[b, t].item() for t in steps] + [0.0]
        delta = [rewards[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(steps)]
        for i, t in enumerate(steps):
            wanted[b, t] = sum((gamma * lam) ** j * d for j, d in enumerate(delta[i:]))
    torch.testing.assert_close(advantages, wanted, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(returns, (wanted + values).where(mask, 0.0), rtol=0.0, atol=1e-12)


@given(table=tables())
@settings(max_examples=40, deadline=None)
def test_garbage_under_the_mask_changes_nothing(table: Table) -> None:
    rewards, values, mask = table
    dirty, dirty_values = rewards.where(mask, torch.nan), values.where(mask, torch.nan)
    clean = gae(rewards, values, mask, lam=0.5)
    for actual, expected in zip(gae(dirty, dirty_values, mask, lam=0.5), clean, strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(returns_to_go(dirty, mask), returns_to_go(rewards, mask))
    assert torch.equal(whiten(dirty, mask), whiten(rewards, mask))


@given(table=tables(), ddof=st.sampled_from([0, 1]))
@settings(max_examples=50, deadline=None)
def test_whitened_tokens_have_mean_0_and_variance_1(table: Table, ddof: int) -> None:
    values, _, mask = table
    white = whiten(values, mask, ddof=ddof)
    assert white[~mask].abs().sum().item() == 0.0
    trained = values[mask]
    if trained.numel() == 0 or trained.max() == trained.min():
        assert white.abs().sum().item() == 0.0
        return
    assert abs(white[mask].mean().item()) <= 1e-12
    variance = white[mask].square().sum().item() / (trained.numel() - ddof)
    assert abs(variance - 1.0) <= 1e-9
    unshifted = whiten(values, mask, ddof=ddof, shift=False)[mask]
    torch.testing.assert_close(unshifted, white[mask] + trained.mean(), rtol=0.0, atol=1e-12)


def test_whitening_equal_values_is_exact() -> None:
    mask = torch.ones(3, 7, dtype=torch.bool)
    assert whiten(torch.full((3, 7), 0.1), mask).abs().max().item() == 0.0
    assert whiten(torch.full((3, 7), 0.5), mask, shift=False).unique().tolist() == [0.5]


@given(table=tables(), gamma=st.sampled_from([0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_reinforce_pp_is_the_whitened_discounted_reward(table: Table, gamma: float) -> None:
    rewards, _, mask = table
    total = rewards.sum(1).tolist()
    rollout = outcome(total, list(range(len(total))), mask=mask)
    advantage = ReinforcePP(gamma=gamma)(rollout, Evidence())
    later = mask.flip(1).cumsum(1).flip(1) - 1  # trained tokens after t
    returns = torch.tensor(total, dtype=torch.float64)[:, None].clamp(-10, 10) * gamma**later
    torch.testing.assert_close(advantage, whiten(returns, mask), rtol=0.0, atol=1e-9)


@given(table=tables())
@settings(max_examples=40, deadline=None)
def test_process_with_one_final_step_is_outcome_supervision(table: Table) -> None:
    rewards, _, mask = table
    rows, width = mask.shape
    if width == 0:
        rewards, mask = torch.zeros(rows, 1).double(), torch.zeros(rows, 1).bool()
    total = rewards[:, 0]
    rollout = outcome(total.tolist(), [0] * rows, mask=mask)
    steps = tuple(((mask.shape[1], value),) for value in total.tolist())
    advantage = Process(eps=0.0)(replace(rollout, steps=steps), Evidence())
    std = total.std().item() if rows > 1 else 0.0
    wanted = (total - total.mean()) / std if std > 0.0 else torch.zeros_like(total)
    expected = wanted[:, None].expand(mask.shape).where(mask, 0.0)
    torch.testing.assert_close(advantage, expected, rtol=0.0, atol=1e-9)


def test_process_without_usable_steps_is_zero() -> None:
    rollout = outcome([1.0, 0.0], [0, 0], mask=torch.ones(2, 2, dtype=torch.bool))
    for steps in (((), ()), (((1, math.nan),), ((0, 1.0),)), (((1, 0.5),), ((2, 0.5),))):
        advantage = Process()(replace(rollout, steps=steps), Evidence())
        assert advantage.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_reinforce_pp_baseline_keeps_dead_groups_at_zero_but_counts_them() -> None:
    # Tokens: +.5 (3x), -.5 (1x), and a dead group's 0 (2x): mean 1/6, variance 1/4·4/6 − 1/36.
    mask = torch.arange(3) < torch.tensor([[3], [1], [1], [1]])
    rollout = outcome([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1], mask=mask)
    advantage = ReinforcePPBaseline()(rollout, Evidence())
    std = math.sqrt(4 / 24 - 1 / 36)
    wanted = [(0.5 - 1 / 6) / std, (-0.5 - 1 / 6) / std, 0.0, 0.0]
    torch.testing.assert_close(
        advantage[:, 0], torch.tensor(wanted, dtype=torch.float64), rtol=0.0, atol=1e-12
    )


@given(
    total=st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4),
    pi=st.floats(0.05, 0.9),
)
@settings(max_examples=40, deadline=None)
def test_optimal_baseline_of_equal_tokens_is_the_group_mean(total: list[float], pi: float) -> None:
    # All rows have the same length and score norm, so the optimal weights are equal.
    shape = (4, 3)
    advantage = optimal_token_baseline(
        torch.tensor(total, dtype=torch.float64),
        torch.full(shape, math.log(pi), dtype=torch.float64),
        sum_pi2=torch.full(shape, 0.5 * pi * pi + 0.5, dtype=torch.float64),
        mask=torch.ones(shape, dtype=torch.bool),
        group=torch.zeros(4, dtype=torch.int64),
        eps=0.0,
    )
    mean = sum(total) / 4
    wanted = torch.tensor([reward - mean for reward in total], dtype=torch.float64)
    torch.testing.assert_close(advantage, wanted[:, None].expand(shape), rtol=0.0, atol=1e-9)
