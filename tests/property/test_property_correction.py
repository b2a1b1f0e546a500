"""Invariants of the corrections for a sampler that differs from the trained policy."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gruppo.objective import (
    DrGrpo,
    GeometricMask,
    Objective,
    PpoClip,
    SequenceMask,
    SequenceTruncate,
    TokenMask,
    TokenMean,
    TokenTruncate,
    mismatch,
)
from support.loss_steps import evaluate, quick, random_step

CORRECTIONS = [
    TokenTruncate(),
    TokenMask(),
    SequenceTruncate(),
    SequenceMask(),
    GeometricMask(),
    TokenTruncate(veto=1e-4),
    TokenMask(batch_normalize=True),
]


@pytest.mark.parametrize("correction", CORRECTIONS)
@quick(5)
@given(seed=st.integers(0, 10_000))
def test_equal_policies_need_no_correction(correction, seed: int) -> None:
    step = random_step(seed)
    plain = Objective(credit=DrGrpo(), surrogate=PpoClip(), weights=TokenMean())
    corrected = replace(plain, correction=correction)
    want = evaluate(plain, step)
    for engine in (step.old, None, torch.full_like(step.logp, torch.nan)):
        value, gradient, losses = evaluate(corrected, replace(step, engine=engine))
        trained = step.mask & step.scored[:, None]
        assert torch.equal(losses[0].tokens.is_weight, trained.double())
        assert torch.equal(losses[0].tokens.is_keep, trained)
        assert value == want[0]
        assert torch.equal(gradient, want[1])


@pytest.mark.parametrize("correction", CORRECTIONS[:6])
@quick(5)
@given(seed=st.integers(0, 10_000))
def test_correction_inside_the_forward_is_the_one_made_beforehand(correction, seed: int) -> None:
    step = random_step(seed)
    objective = Objective(
        credit=DrGrpo(), surrogate=PpoClip(), weights=TokenMean(), correction=correction
    )
    before = evaluate(objective, replace(step, old=step.logp))
    inside = evaluate(objective, replace(step, old=None))
    assert inside[0] == before[0]
    assert torch.equal(inside[1], before[1])


@quick(20)
@given(seed=st.integers(0, 10_000))
def test_normalised_weights_have_mean_one(seed: int) -> None:
    step = random_step(seed)
    assert step.old is not None
    assert step.engine is not None
    weight, _ = TokenTruncate(batch_normalize=True)(step.old, step.engine, step.mask)
    assert weight[step.mask].mean().item() == pytest.approx(1.0, abs=1e-12)


def test_mismatch_of_nothing_and_of_equal_policies() -> None:
    step = random_step(15)
    assert step.old is not None
    none = mismatch(step.old, step.old + 1, torch.zeros_like(step.mask))
    same = mismatch(step.old, step.old, step.mask)
    for found in (none, same):
        assert found["ess"] == pytest.approx(1.0, abs=1e-12)
        assert found["mismatch_k1"] == found["mismatch_k3"] == found["chi2_seq"] == 0.0
    assert same["prob_correlation"] == pytest.approx(1.0, abs=1e-12)
    missing = mismatch(step.old, torch.full_like(step.old, torch.nan), step.mask)
    assert missing["frac_missing"] == 1.0
    assert missing["mismatch_k3"] == 0.0
