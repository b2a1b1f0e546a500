"""Invariants of the loss for every preset: splits, order, padding, garbage, equivalences."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from jaxtyping import config as shape_checks

from gruppo.objective import (
    PRESETS,
    Cispo,
    Coefficients,
    Constant,
    DppoKl,
    DppoTv,
    DrGrpo,
    Dro,
    EntropyTerm,
    GeometricMask,
    Gmpo,
    Gspo,
    GspoToken,
    Importance,
    KlCov,
    KlCovTokens,
    KLNaive,
    KLSquare,
    KLTerm,
    KLUnbiased,
    Live,
    Loss,
    Luspo,
    Objective,
    PpoClip,
    Reinforce,
    RlooSeq,
    Rows,
    Sapo,
    SeqMeanTokenMean,
    SequenceMask,
    SequenceTruncate,
    TokenMask,
    TokenMean,
    TokenTruncate,
    Totals,
    Vespo,
    compute_loss,
    k1,
    k2,
    k3,
    make_rows,
    mismatch,
)

F64 = torch.float64
CORRECTIONS = [
    TokenTruncate(),
    TokenMask(),
    SequenceTruncate(),
    SequenceMask(),
    GeometricMask(),
    TokenTruncate(veto=1e-4),
    TokenMask(batch_normalize=True),
]
# Terms that these losses add to the policy gradient do not carry an advantage.
PENALISED = ("dppo_kl", "kl_cov", "dro")


@pytest.fixture(scope="module")
def _unchecked() -> Iterator[None]:
    """No shape checks where thousands of losses are computed: they take four fifths of the time.

    The golden tests and test_nothing_to_train_is_finite run the same code with them.
    """
    shape_checks.update("jaxtyping_disable", True)
    yield
    shape_checks.update("jaxtyping_disable", False)


fast = pytest.mark.usefixtures("_unchecked")


def quick(examples: int):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """Tensors of an optimizer step, all [B, T] but group [B] and scored [B]."""

    logp: torch.Tensor
    old: torch.Tensor | None
    engine: torch.Tensor | None
    ref: torch.Tensor
    entropy: torch.Tensor
    advantage: torch.Tensor
    mask: torch.Tensor
    group: torch.Tensor
    scored: torch.Tensor


def random_step(seed: int, rows: int = 11, width: int = 7, drift: float = 0.3) -> Step:
    """Random values; some rows without trained tokens, one unscored, group ids in any order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(rows, width, dtype=F64, generator=generator)

    old = -normal(1.5).abs()
    mask = torch.rand(rows, width, generator=generator) < 0.75
    scored = torch.rand(rows, generator=generator) < 0.9
    row_advantage = torch.randn(rows, 1, dtype=F64, generator=generator)
    return Step(
        logp=-(old + normal(drift)).abs(),
        old=old,
        engine=old + normal(drift / 2),
        ref=old + normal(1.0),
        entropy=normal(1.0).abs(),
        advantage=torch.where(scored[:, None], row_advantage, 0).expand(rows, width),
        mask=mask,
        group=torch.randint(0, 3, (rows,), generator=generator),
        scored=scored,
    )


def runnable(objective: Objective) -> Objective:
    """The objective with the one setting that a recipe fills in."""
    if isinstance(objective.weights, Constant):
        return replace(objective, weights=Constant(length=16))
    return objective


def rows_of(objective: Objective, step: Step) -> Rows:
    selected = None
    if objective.select is not None:
        selected = objective.select(
            step.logp,
            step.entropy,
            old_logp=step.logp if step.old is None else step.old,
            advantage=step.advantage,
            mask=step.mask & step.scored[:, None],
            seed=5,
        )
    return make_rows(
        objective,
        advantage=step.advantage,
        mask=step.mask,
        group=step.group,
        scored=step.scored,
        old_logp=step.old,
        engine_logp=step.engine,
        ref_logp=step.ref,
        totals=Totals.of(step.mask, step.group),
        selected=selected,
    )


def evaluate(
    objective: Objective,
    step: Step,
    parts: list[torch.Tensor] | None = None,
    rows: Rows | None = None,
) -> tuple[float, torch.Tensor, list[Loss]]:
    """Sum of losses and gradient [B, T] with respect to logp, over a split of the rows."""
    rows = rows_of(objective, step) if rows is None else rows
    coefficients = Coefficients(kl=objective.coefficients.kl, entropy=0.01)
    gradient, losses = torch.full_like(step.logp, torch.nan), []
    for index in [torch.arange(len(step.mask))] if parts is None else parts:
        logp = step.logp[index].requires_grad_()
        live = Live(logp=logp, entropy=step.entropy[index], mask=step.mask[index])
        loss = compute_loss(objective, live, rows.take(index), coefficients)
        (gradient[index],) = torch.autograd.grad(loss.value, logp)
        losses.append(loss)
    return sum(loss.value.item() for loss in losses), gradient, losses


@fast
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


@fast
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


@fast
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


@fast
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


@fast
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


@fast
@quick(20)
@given(seed=st.integers(0, 10_000), cap=st.floats(1.3, 6.0))
def test_dual_clip_is_the_two_sided_clip(seed: int, cap: float) -> None:
    step = random_step(seed, drift=1.5)
    base = Objective(credit=DrGrpo(), surrogate=PpoClip(), weights=TokenMean())
    dual = evaluate(replace(base, surrogate=PpoClip(dual_clip=cap)), step)
    two_sided = evaluate(replace(base, surrogate=PpoClip(delta=cap)), step)
    assert dual[0] == two_sided[0]
    assert torch.equal(dual[1], two_sided[1])


@fast
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


@fast
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


@quick(50)
@given(
    logp=st.floats(-60, 0), ref=st.floats(-60, 0), nudge=st.sampled_from([0.0, 1e-9, -1e-9, 1e-4])
)
def test_k3_is_never_negative(logp: float, ref: float, nudge: float) -> None:
    policy, reference = torch.tensor([logp], dtype=F64), torch.tensor([ref], dtype=F64)
    assert 0.0 <= k3(policy, reference).item() <= 10.0
    assert 0.0 <= k3(policy, policy + nudge).item() <= nudge**2
    assert k2(policy, policy + nudge).item() == pytest.approx(nudge**2 / 2, rel=1e-4)


def test_k1_and_k3_agree_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    pi = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    ref = torch.tensor([0.4, 0.4, 0.2], dtype=F64)
    drawn = torch.multinomial(pi, 400_000, replacement=True, generator=generator)
    logp, ref_logp = pi.log()[drawn], ref.log()[drawn]
    # Standard errors over 400,000 samples: 3.2e-4 for k1, 3.5e-5 for k3.
    assert k1(logp, ref_logp).mean().item() == pytest.approx(0.0252672, abs=1.3e-3)
    assert k3(logp, ref_logp).mean().item() == pytest.approx(0.0252672, abs=1.4e-4)


@fast
@quick(20)
@given(seed=st.integers(0, 10_000))
def test_gradient_of_ratio_times_k3_is_ratio_times_delta(seed: int) -> None:
    step = random_step(seed)
    assert step.old is not None
    logp = step.logp.clone().requires_grad_()
    term = KLUnbiased()(logp, step.old, step.ref)
    (gradient,) = torch.autograd.grad(term.sum(), logp)
    ratio = (step.logp - step.old).exp()
    torch.testing.assert_close(gradient, ratio * (step.logp - step.ref), rtol=1e-12, atol=0)
    torch.testing.assert_close(term.detach(), ratio * k3(step.logp, step.ref))
    # The plain product gives the same, by a path that can overflow.
    (product,) = torch.autograd.grad(((logp - step.old).exp() * k3(logp, step.ref)).sum(), logp)
    unclamped = k3(step.logp, step.ref) < 10
    torch.testing.assert_close(gradient[unclamped], product[unclamped], rtol=1e-9, atol=1e-12)


DIFFERENTIABLE = [
    PpoClip(),
    PpoClip(dual_clip=3.0),
    PpoClip(delta=4.0),
    PpoClip(bypass=True),
    Reinforce(),
    Importance(),
    Sapo(),
    Gspo(eps_low=0.1, eps_high=0.1),
    Gmpo(),
    Luspo(eps_low=0.1, eps_high=0.1),
    RlooSeq(),
    DppoTv(),
    DppoKl(kl_tau=0.1),
    KlCov(kappa=0.5),
    Dro(b=0.3),
]


@fast
@pytest.mark.parametrize("surrogate", DIFFERENTIABLE)
@quick(3)
@given(seed=st.integers(0, 10_000))
def test_gradient_is_the_difference_quotient(surrogate, seed: int) -> None:
    step = random_step(seed, rows=3, width=3)
    assert step.old is not None
    objective = Objective(
        credit=DrGrpo(),
        surrogate=surrogate,
        weights=SeqMeanTokenMean(),
        select=KlCovTokens(fraction=0.5) if isinstance(surrogate, KlCov) else None,
        kl=KLTerm(beta=0.1, estimator=KLNaive()),
    )
    # |logp - old| has a kink at 0, k3 is cut at 10; clip bounds are kinks where the flags change.
    assume((step.logp - step.old).abs().min() > 1e-4)
    assume(k3(step.logp, step.ref).max() < 9.9)
    rows, width = rows_of(objective, step), 1e-6
    _, gradient, at = evaluate(objective, step, rows=rows)
    for place in step.mask.nonzero().tolist():
        shift = torch.zeros_like(step.logp)
        shift[tuple(place)] = width
        high = evaluate(objective, replace(step, logp=step.logp + shift), rows=rows)
        low = evaluate(objective, replace(step, logp=step.logp - shift), rows=rows)
        for side in (high[2][0], low[2][0]):
            assume(torch.equal(side.tokens.clipped_low, at[0].tokens.clipped_low))
            assume(torch.equal(side.tokens.clipped_high, at[0].tokens.clipped_high))
        quotient = (high[0] - low[0]) / (2 * width)
        assert gradient[tuple(place)].item() == pytest.approx(quotient, rel=2e-6, abs=2e-8)


def test_entropy_and_kl_reach_the_gradient_with_their_coefficients() -> None:
    step = random_step(11)
    objective = Objective(
        credit=DrGrpo(),
        surrogate=Reinforce(),
        weights=TokenMean(),
        kl=KLTerm(beta=0.2, estimator=KLSquare()),
        entropy=EntropyTerm(coef=0.03),
    )
    logp, entropy = step.logp.clone().requires_grad_(), step.entropy.clone().requires_grad_()
    live = Live(logp=logp, entropy=entropy, mask=step.mask)
    loss = compute_loss(objective, live, rows_of(objective, step), objective.coefficients)
    by_logp, by_entropy = torch.autograd.grad(loss.value, [logp, entropy])
    share = step.mask.double() / step.mask.sum()
    policy = -step.advantage * step.scored[:, None]
    torch.testing.assert_close(by_logp, share * (policy + 0.2 * (step.logp - step.ref)))
    torch.testing.assert_close(by_entropy, -0.03 * share)
    total = loss.policy + 0.2 * loss.kl - 0.03 * loss.entropy
    assert loss.value.item() == pytest.approx(total.item(), rel=1e-14)


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
