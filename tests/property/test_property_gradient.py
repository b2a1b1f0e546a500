"""KL estimators and gradients: closed forms, difference quotients, coefficients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gruppo.objective import (
    DppoKl,
    DppoTv,
    DrGrpo,
    Dro,
    EntropyTerm,
    Gmpo,
    Gspo,
    Importance,
    KlCov,
    KlCovTokens,
    KLNaive,
    KLSquare,
    KLTerm,
    KLUnbiased,
    Live,
    Luspo,
    Objective,
    PpoClip,
    Reinforce,
    RlooSeq,
    Sapo,
    SeqMeanTokenMean,
    TokenMean,
    compute_loss,
    k1,
    k2,
    k3,
)
from support.loss_steps import F64, evaluate, quick, random_step, rows_of


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


@pytest.mark.usefixtures("unchecked")
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


@pytest.mark.usefixtures("unchecked")
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
