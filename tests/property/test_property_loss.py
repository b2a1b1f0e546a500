"""Invariants of the loss for every preset: splits, order, padding, garbage, equivalences."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gruppo.objective import (
    PRESETS,
    Cispo,
    DppoTv,
    DrGrpo,
    Gspo,
    GspoToken,
    Importance,
    Objective,
    PpoClip,
    SeqMeanTokenMean,
    TokenMean,
    TokenTruncate,
    Vespo,
)
from support.loss_steps import evaluate, quick, random_step, rows_of, runnable

# Terms that these losses add to the policy gradient do not carry an advantage.
PENALISED = ("dppo_kl", "kl_cov", "dro")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", PRESETS)
@quick(2)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 9))
def test_splits_and_order_change_nothing(name: str, seed: int, width: int) -> None:
    objective = runnable(PRESETS[name].objective)
    step = random_step(seed, rows=8, width=width)
    value, gradient, _ = evaluate(objective, step)
    rows, generator = rows_of(objective, step), torch.Generator().manual_seed(seed)
    for size in (1, 2, 3, 5, 7, 8):
        order = torch.randperm(8, generator=generator) if size != 3 else torch.arange(8)
        split_value, split_gradient, _ = evaluate(objective, step, list(order.split(size)), rows)
        assert (split_gradient - gradient).abs().max().item() == 0.0
        assert split_value == pytest.approx(value, rel=1e-12, abs=1e-14)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", PRESETS)
@quick(2)
@given(seed=st.integers(0, 10_000))
def test_values_under_the_mask_change_nothing(name: str, seed: int) -> None:
    objective = runnable(PRESETS[name].objective)
    step = random_step(seed)
    assert step.old is not None
    assert step.engine is not None
    value, gradient, losses = evaluate(objective, step)
    for garbage in (torch.nan, torch.inf, -1e308):
        dirty = replace(
            step,
            logp=step.logp.where(step.mask, garbage),
            old=step.old.where(step.mask, garbage),
            engine=step.engine.where(step.mask, -garbage),
            ref=step.ref.where(step.mask, garbage),
            entropy=step.entropy.where(step.mask, garbage),
            advantage=step.advantage.where(step.mask, garbage),
        )
        dirty_value, dirty_gradient, dirty_losses = evaluate(objective, dirty)
        assert dirty_value == value
        assert torch.equal(dirty_gradient, gradient)
        assert torch.equal(dirty_losses[0].tokens.ratio, losses[0].tokens.ratio)
        assert not gradient[~step.mask].any()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", PRESETS)
@quick(2)
@given(seed=st.integers(0, 10_000))
def test_padding_changes_nothing(name: str, seed: int) -> None:
    objective = runnable(PRESETS[name].objective)
    step = random_step(seed)

    def pad(tensor: torch.Tensor | None) -> torch.Tensor:
        assert tensor is not None
        return torch.nn.functional.pad(tensor, (0, 5))

    wide = replace(
        step,
        logp=pad(step.logp),
        old=pad(step.old),
        engine=pad(step.engine),
        ref=pad(step.ref),
        entropy=pad(step.entropy),
        advantage=pad(step.advantage),
        mask=pad(step.mask),
    )
    value, gradient, _ = evaluate(objective, step)
    wide_value, wide_gradient, _ = evaluate(objective, wide)
    assert wide_value == pytest.approx(value, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(wide_gradient[:, :7], gradient, rtol=1e-13, atol=1e-16)
    assert not wide_gradient[:, 7:].any()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", PRESETS)
@quick(2)
@given(seed=st.integers(0, 10_000))
def test_no_advantage_no_policy_gradient(name: str, seed: int) -> None:
    objective = replace(runnable(PRESETS[name].objective), kl=None, entropy=None)
    step = random_step(seed)
    if objective.surrogate.kind in PENALISED:
        # Their penalties vanish where the policies agree.
        step = replace(step, logp=step.old, engine=step.old)
    step = replace(step, advantage=torch.zeros_like(step.advantage))
    _, gradient, _ = evaluate(objective, step)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", PRESETS)
@quick(2)
@given(seed=st.integers(0, 10_000))
def test_missing_old_values_are_the_live_ones(name: str, seed: int) -> None:
    objective = runnable(PRESETS[name].objective)
    step = random_step(seed)
    value, gradient, _ = evaluate(objective, replace(step, old=step.logp))
    lazy_value, lazy_gradient, _ = evaluate(objective, replace(step, old=None))
    assert lazy_value == value
    assert torch.equal(lazy_gradient, gradient)


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_to_train_is_finite(name: str) -> None:
    objective = runnable(PRESETS[name].objective)
    one, empty = random_step(1, rows=1), random_step(2, rows=3, width=0)
    masked = replace(random_step(3), mask=torch.zeros(11, 7, dtype=torch.bool))
    unscored = replace(random_step(4), scored=torch.zeros(11, dtype=torch.bool))
    for step in (one, empty, masked, unscored):
        value, gradient, losses = evaluate(objective, step)
        assert torch.isfinite(torch.tensor(value))
        assert torch.isfinite(gradient).all()
        assert losses[0].policy.item() == 0.0 or step is one
    _, gradient, _ = evaluate(replace(objective, kl=None), unscored)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.usefixtures("unchecked")
@quick(20)
@given(seed=st.integers(0, 10_000), cap=st.floats(1.3, 6.0))
def test_dual_clip_is_the_two_sided_clip(seed: int, cap: float) -> None:
    step = random_step(seed, drift=1.5)
    base = Objective(credit=DrGrpo(), surrogate=PpoClip(), weights=TokenMean())
    dual = evaluate(replace(base, surrogate=PpoClip(dual_clip=cap)), step)
    two_sided = evaluate(replace(base, surrogate=PpoClip(delta=cap)), step)
    assert dual[0] == two_sided[0]
    assert torch.equal(dual[1], two_sided[1])


@pytest.mark.usefixtures("unchecked")
@quick(20)
@given(seed=st.integers(0, 10_000), eps=st.floats(1e-4, 0.5))
def test_gspo_token_is_gspo_for_constant_advantages(seed: int, eps: float) -> None:
    step = random_step(seed)
    base = Objective(
        credit=DrGrpo(),
        surrogate=Gspo(eps_low=eps, eps_high=eps),
        weights=SeqMeanTokenMean(),
    )
    token = replace(base, surrogate=GspoToken(eps_low=eps, eps_high=eps))
    row_value, row_gradient, _ = evaluate(base, step)
    value, gradient, _ = evaluate(token, step)
    assert value == pytest.approx(row_value, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(gradient, row_gradient, rtol=1e-13, atol=1e-16)


@pytest.mark.usefixtures("unchecked")
@quick(20)
@given(seed=st.integers(0, 10_000))
def test_wide_bounds_are_plain_importance_weighting(seed: int) -> None:
    step = random_step(seed, drift=0.5)
    base = Objective(credit=DrGrpo(), surrogate=Importance(), weights=TokenMean())
    plain = evaluate(base, step)
    for surrogate in (PpoClip(eps_low=1.0, eps_high=1e9), DppoTv(delta_low=1.0, delta_high=1.0)):
        wide = evaluate(replace(base, surrogate=surrogate), step)
        assert wide[0] == plain[0]
        assert torch.equal(wide[1], plain[1])
    # CISPO without a binding bound has another value, but the same gradient.
    cispo = evaluate(replace(base, surrogate=Cispo(w_max=1e9)), step)
    torch.testing.assert_close(cispo[1], plain[1], rtol=1e-13, atol=1e-16)


def test_weights_of_unscored_rows_stay_in_the_other_terms() -> None:
    step = random_step(12)
    rows = rows_of(Objective(credit=DrGrpo(), surrogate=PpoClip(), weights=TokenMean()), step)
    assert not step.scored.all()
    assert not rows.weight[~step.scored].any()
    torch.testing.assert_close(rows.kl_weight.sum().item(), 1.0, rtol=1e-14, atol=0)


def test_vespo_against_the_engine_takes_the_whole_ratio() -> None:
    step = random_step(13)
    base = Objective(credit=DrGrpo(), surrogate=Vespo(bypass=True), weights=TokenMean())
    through = evaluate(base, step)
    direct = evaluate(replace(base, surrogate=Vespo()), replace(step, old=step.engine))
    assert torch.equal(through[1], direct[1])


def test_rows_travel_and_shrink() -> None:
    step = random_step(14)
    objective = replace(runnable(PRESETS["v32"].objective), correction=TokenTruncate())
    rows = rows_of(objective, step)
    small = rows.to("cpu", torch.float32).take(torch.tensor([3, 1]), width=4)
    assert small.old_logp is not None
    assert small.is_weight is not None
    assert small.old_logp.dtype == small.weight.dtype == torch.float32
    assert torch.equal(small.old_logp, step.old[[3, 1], :4].float())
    assert torch.equal(small.is_weight, rows.is_weight[[3, 1], :4].float())
    assert torch.equal(small.mask, step.mask[[3, 1], :4])
