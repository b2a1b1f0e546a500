"""Rules around the objective, by hand: truncation policies, controllers, estimators, refusals."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gruppo.objective.batch import accumulation_steps, optimizer_steps, rows_per_rollout
from gruppo.objective.composition import Objective
from gruppo.objective.control import AdaptiveEntropy, AdaptiveKL, mix
from gruppo.objective.credit import Grpo, outcome
from gruppo.objective.estimate import pass_at_k, pass_hat_k, standard_error
from gruppo.objective.filters import mean_inside, refill
from gruppo.objective.masks import (
    ExcludeBefore,
    KeepTruncated,
    MaskAfter,
    Penalty,
    Truncation,
    ZeroReward,
    mask_from_stop,
)
from gruppo.objective.pairs import implicit_reward, ipo_loss
from gruppo.objective.staleness import is_fresh, may_start, staleness
from gruppo.objective.surrogate import PpoClip
from gruppo.objective.value import value_loss
from gruppo.objective.weights import TokenMean
from gruppo.types import is_live
from support.loss_steps import rows_for_rollout

NAN = float("nan")


@pytest.mark.parametrize(
    ("policy", "total", "trains"),
    [
        (KeepTruncated(), [1.0, 0.5, NAN, 2.0], [1, 1, 0, 1]),
        (MaskAfter(), [1.0, 0.5, NAN, 2.0], [1, 0, 0, 0]),
        (ExcludeBefore(), [1.0, NAN, NAN, NAN], [1, 0, 0, 0]),
        (ZeroReward(), [1.0, 0.0, NAN, 0.0], [1, 1, 0, 1]),
        (Penalty(value=-0.5), [1.0, -0.5, NAN, -0.5], [1, 1, 0, 1]),
        (Penalty(value=0.25), [1.0, 0.125, NAN, 0.5], [1, 1, 0, 1]),
    ],
    ids=repr,
)
def test_truncation_policies(policy: Truncation, total: list[float], trains: list[int]) -> None:
    rollout = replace(
        outcome([1.0, 0.5, NAN, 2.0], [0] * 4),
        truncated=torch.tensor([False, True, True, True]),
    )
    changed = policy(rollout)
    expected = torch.tensor(total, dtype=torch.float64)
    torch.testing.assert_close(changed.total, expected, rtol=0.0, atol=0.0, equal_nan=True)
    objective = Objective(credit=Grpo(), surrogate=PpoClip(), weights=TokenMean())
    weight = rows_for_rollout(objective, changed, torch.ones(4)).weight
    assert (weight > 0).any(dim=1).long().tolist() == trains
    assert torch.equal(changed.task, rollout.task) or torch.isnan(rollout.task).any()


def test_mask_knows_several_stop_tokens_and_empty_rows() -> None:
    tokens = torch.tensor([[9, 3, 2], [2, 3, 9], [9, 9, 9]])
    mask, length, truncated = mask_from_stop(tokens, [2, 3])
    assert mask.long().tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert length.tolist() == [2, 1, 3]
    assert truncated.tolist() == [False, False, True]
    mask, length, truncated = mask_from_stop(torch.zeros(2, 0, dtype=torch.int64), [2])
    assert (mask.shape, length.tolist(), truncated.tolist()) == ((2, 0), [0, 0], [True, True])


@given(
    entropies=st.lists(st.floats(0.0, 1.0), max_size=30),
    start=st.floats(0.0, 2.0),
    low=st.floats(0.0, 0.01),
)
@settings(max_examples=50, deadline=None)
def test_adaptive_entropy_stays_in_range(entropies: list[float], start: float, low: float) -> None:
    control = AdaptiveEntropy(min=low, max=0.02)
    state, coefficient = control.start(start)
    assert coefficient == 0.0
    for entropy in entropies:
        state, coefficient = control(state, entropy, 4)
        assert low <= state <= 0.02
        assert coefficient == (state if entropy <= 0.2 else 0.0)


@given(observed=st.lists(st.floats(0.0, 100.0), max_size=30))
@settings(max_examples=50, deadline=None)
def test_adaptive_kl_follows_the_sign_and_never_turns_negative(observed: list[float]) -> None:
    control = AdaptiveKL(target=1.0, horizon=100)
    state, _ = control.start(0.1)
    for kl in observed:
        after, coefficient = control(state, kl, 400)
        assert after == coefficient >= 0.0
        assert (after - state) * (kl - 1.0) >= 0.0
        assert abs(after - state) <= 0.2 * 4 * state * (1.0 + 1e-9)
        state = after


def test_controllers_ignore_steps_without_tokens() -> None:
    assert AdaptiveKL(target=1.0)(0.3, NAN, 8) == (0.3, 0.3)
    assert AdaptiveEntropy()(0.3, NAN, 8) == (0.3, 0.0)


def test_reference_mix_ends() -> None:
    reference, policy = torch.tensor([1.0, -1.0]), torch.tensor([3.0, 3.0])
    assert mix(reference, policy, alpha=1.0).tolist() == [3.0, 3.0]
    assert mix(reference, policy, alpha=0.0).tolist() == [1.0, -1.0]


@given(n=st.integers(1, 30), data=st.data())
@settings(max_examples=80, deadline=None)
def test_pass_estimators_equal_binomials(n: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(0, n))
    values = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    for k, value in enumerate(values, start=1):
        assert value == pytest.approx(1.0 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)
        assert pass_hat_k(n, c, k) == pytest.approx(math.comb(c, k) / math.comb(n, k), abs=1e-12)
    assert values[0] == pytest.approx(c / n, abs=1e-12)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))


def test_pass_at_k_of_many_draws_is_exact() -> None:
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, abs=1e-12)


def test_filters_ignore_unscored_rows() -> None:
    assert not is_live([1.0, None, 1.0 + 1e-9])
    assert is_live([1.0, None, 0.0])
    assert mean_inside([1.0, None, 0.0], low=0.2, high=0.8)
    assert not mean_inside([None, None])
    assert not mean_inside([1.0, 0.0], low=0.5, high=0.9)


def test_staleness_edges() -> None:
    assert staleness([], 7) == 0
    assert is_fresh([7], 7, max_staleness=0)
    assert not is_fresh([7, 6], 7, max_staleness=0)
    assert [may_start(n, batch=2, version=0, max_staleness=0) for n in (1, 2, 3)] == [
        True,
        True,
        False,
    ]


def test_value_loss_takes_the_worse_of_both() -> None:
    tensors = [torch.tensor([[x]], dtype=torch.float64) for x in (1.0, 0.0, 1.0)]
    # V = R would cost 0, but V may move only .2 from V_old: ½ (0.2 − 1)² = .32.
    loss = value_loss(tensors[0], tensors[1], returns=tensors[2], clip=0.2)
    assert loss.item() == pytest.approx(0.32, abs=1e-12)


def test_inner_epochs_multiply_the_steps() -> None:
    assert optimizer_steps(8, 4, minibatch_rows=16, inner_epochs=3) == 6


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AdaptiveKL(target=0.0), "target = 0.0"),
        (lambda: AdaptiveKL(target=1.0, horizon=0), "horizon = 0"),
        (lambda: AdaptiveEntropy(min=0.5, max=0.1), "max = 0.1 is below min = 0.5"),
        (lambda: AdaptiveEntropy(delta=-1.0), "delta = -1.0"),
        (lambda: mix(torch.ones(1), torch.ones(1), alpha=1.5), "alpha = 1.5"),
        (lambda: Penalty(value=NAN), "value = nan"),
        (lambda: mean_inside([1.0], low=1.0, high=0.0), "low = 1.0 must be below"),
        (lambda: refill(lambda n: [n], bool, target=0), "target = 0"),
        (lambda: pass_at_k(4, 5, 1), "c = 5 right answers of n = 4"),
        (lambda: pass_hat_k(4, 2, 5), "k = 5 must be between 1"),
        (lambda: standard_error(0.5, 0), "n = 0"),
        (lambda: standard_error(1.5, 3), "p = 1.5"),
        (lambda: may_start(1, batch=0, version=0, max_staleness=0), "batch = 0"),
        (lambda: rows_per_rollout(0, 8), "prompts = 0"),
        (lambda: accumulation_steps(10, ranks=4, micro_rows=1), "10 is not divisible by 4"),
        (lambda: implicit_reward(torch.ones(1), torch.ones(1), beta=0.0), "beta = 0.0"),
        (lambda: ipo_loss(torch.ones(1), torch.ones(1), beta=-1.0), "beta = -1.0"),
        (
            lambda: value_loss(
                torch.ones(1, 1), torch.ones(1, 1), returns=torch.ones(1, 1), clip=0.0
            ),
            "clip = 0.0",
        ),
    ],
)
def test_bad_settings_are_refused(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
