"""Golden KL and entropy: estimators, loss terms, and expected gradients by enumeration."""

import pytest
import torch

from gruppo.objective import (
    Coefficients,
    DrGrpo,
    KLNaive,
    KLSequenceSquare,
    KLSquare,
    KLStraightThrough,
    KLTerm,
    KLUnbiased,
    Live,
    Objective,
    Reinforce,
    Rows,
    TokenMean,
    Totals,
    compute_loss,
    full_kl,
    k1,
    k2,
    k3,
    logp_and_entropy,
    make_rows,
)

F64 = torch.float64


def assert_matches(actual: torch.Tensor, expected: object, tol: float = 1e-6) -> None:
    wanted = torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), wanted, atol=tol, rtol=0)


def with_kl(estimator: object) -> Objective:
    return Objective(
        credit=DrGrpo(),
        surrogate=Reinforce(),
        weights=TokenMean(),
        kl=KLTerm(beta=1.0, estimator=estimator),
    )


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("shape", ["kl/estimators", "kl/scalar"])
def test_estimators(golden, shape: str, dtype: torch.dtype) -> None:
    case = golden(shape)
    logp, ref = (torch.tensor(case["inputs"][key], dtype=dtype) for key in ("logp", "ref_logp"))
    tol = case["tol"] if dtype == F64 else 1e-5
    mask = torch.tensor(case["inputs"].get("mask", 1.0)).bool()
    for name, estimate in (("k1", k1), ("k2", k2), ("k3", k3)):
        assert_matches(torch.where(mask, estimate(logp, ref), 0), case["expected"][name], tol)


def test_k3_clamped(golden) -> None:
    case = golden("kl/k3_clamped")
    logp = torch.tensor(case["inputs"]["logp"], dtype=F64, requires_grad=True)
    ref = torch.tensor(case["inputs"]["ref_logp"], dtype=F64)
    value = k3(logp, ref)
    assert_matches(value, case["expected"]["k3"])
    value.sum().backward()
    # Outside ±20 there is no gradient; a value cut at 10 (none here) would keep its own.
    assert_matches(logp.grad, [0.0, 1 - torch.e**2, 1 - torch.e**-0.5])


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("kl/k3_loss_naive", KLNaive()),
        ("kl/k3_loss_unbiased_is", KLUnbiased()),
        ("kl/k3_loss_unbiased_st", KLStraightThrough()),
        ("kl/k2_loss", KLSquare()),
    ],
)
def test_loss_terms(golden, name: str, estimator, dtype: torch.dtype) -> None:
    case = golden(name)
    inputs = {
        key: torch.tensor(value, dtype=dtype)
        for key, value in case["inputs"].items()
        if key != "agg"
    }
    tol = case["tol"] if dtype == F64 else 1e-5
    objective, mask = with_kl(estimator), inputs["mask"].bool()
    group = torch.zeros(len(mask), dtype=torch.int64)
    logp = inputs["logp"].requires_grad_()
    rows = make_rows(
        objective,
        advantage=torch.zeros(len(mask), dtype=F64),
        mask=mask,
        group=group,
        scored=torch.ones(len(mask), dtype=torch.bool),
        old_logp=inputs.get("old_logp"),
        engine_logp=None,
        ref_logp=inputs["ref_logp"],
        totals=Totals.of(mask, group),
        selected=None,
    )
    live = Live(logp=logp, entropy=None, mask=mask)
    loss = compute_loss(objective, live, rows, objective.coefficients)
    loss.value.backward()
    assert_matches(loss.value, case["expected"]["loss"], tol)
    assert_matches(loss.kl, case["expected"]["loss"], tol)
    assert_matches(logp.grad, case["expected"]["grad_logp"], tol)


def test_k1_loss_is_useless(golden) -> None:
    case = golden("kl/k1_loss_is_useless")
    mask = torch.tensor(case["inputs"]["mask"]).bool()
    logp = torch.tensor(case["inputs"]["logp"], dtype=F64, requires_grad=True)
    group = torch.zeros(len(mask), dtype=torch.int64)
    weight = TokenMean()(mask, group, Totals.of(mask, group))
    loss = (weight * k1(logp, torch.tensor(case["inputs"]["ref_logp"], dtype=F64))).sum()
    loss.backward()
    assert_matches(loss, case["expected"]["loss"])
    assert_matches(logp.grad, case["expected"]["grad_logp"])
    with pytest.raises(ValueError, match="expected gradient 0"):
        KLTerm(beta=0.1, estimator=k1)


def expected_gradient(logits, outcomes, *, probability, estimator=None, ref=None, old=None, credit):
    """Gradient of Σ_outcomes probability · loss, through compute_loss with those as weights.

    ``logits`` maps a tensor of parameters to per-outcome log-probabilities [outcomes, T].
    """
    parameters = outcomes.clone().requires_grad_()
    logp = logits(parameters)
    mask = torch.ones(logp.shape, dtype=torch.bool)
    weight = probability[:, None].expand(logp.shape)
    objective = Objective(
        credit=DrGrpo(),
        surrogate=Reinforce(),
        weights=TokenMean(),
        kl=None if estimator is None else KLTerm(beta=1.0, estimator=estimator),
    )
    rows = Rows(
        mask=mask,
        advantage=credit,
        scored=torch.ones(len(mask), dtype=torch.bool),
        old_logp=logp.detach() if old is None else old,
        engine_logp=None,
        ref_logp=ref,
        weight=weight,
        kl_weight=weight,
        selected=None,
    )
    live = Live(logp=logp, entropy=None, mask=mask)
    compute_loss(objective, live, rows, Coefficients(kl=1.0)).value.backward()
    return parameters.grad


def softmax_rows(parameters: torch.Tensor) -> torch.Tensor:
    """One row per outcome of a one-token softmax."""
    return parameters.log_softmax(0)[:, None]


class RatioTimesK2:
    """exp(logp - old)·k2 with everything live: one of the forms that are wrong off-policy."""

    def __call__(self, logp, old_logp, ref_logp):
        return (logp - old_logp).exp() * k2(logp, ref_logp)


def test_exact_gradients_enumeration(golden) -> None:
    case = golden("kl/exact_gradients_enumeration")
    pi, ref = (torch.tensor(case["inputs"][key], dtype=F64) for key in ("pi", "ref"))
    want, none = case["expected"], torch.zeros(3, 1, dtype=F64)
    logp, ref_logp = pi.log(), ref.log()

    def in_loss(estimator: object) -> torch.Tensor:
        return expected_gradient(
            softmax_rows,
            logp,
            probability=pi,
            estimator=estimator,
            ref=ref_logp[:, None],
            credit=none,
        )

    def in_reward(value: torch.Tensor) -> torch.Tensor:
        return expected_gradient(softmax_rows, logp, probability=pi, credit=-value[:, None])

    assert_matches(in_loss(KLSquare()), want["grad_k2_in_loss"])
    assert_matches(in_loss(KLStraightThrough()), want["grad_k2_in_loss"])
    assert_matches(in_loss(KLNaive()), want["grad_k3_in_loss"])
    assert_matches(in_loss(KLUnbiased()), want["grad_ratio_times_k3"])
    assert_matches(in_loss(KLSequenceSquare()), want["grad_kl_reverse"])
    assert_matches(in_reward(torch.ones(3, dtype=F64)), want["grad_k1_in_loss"])
    for name, estimate in (("k1", k1), ("k2", k2), ("k3", k3)):
        value = estimate(logp, ref_logp)
        assert_matches((pi * value).sum(), want[f"mean_{name}"])
        assert_matches(in_reward(value), want[f"grad_{name}_in_reward"])
    parameters = logp.clone().requires_grad_()
    full_kl(parameters, ref_logp).backward()
    assert_matches(parameters.grad, want["grad_kl_reverse"])
    assert_matches(full_kl(logp, ref_logp), want["kl_reverse"])
    assert_matches(full_kl(ref_logp, logp), want["kl_forward"])
    parameters.grad = None
    full_kl(ref_logp, parameters).backward()
    assert_matches(parameters.grad, want["grad_kl_forward"])


def test_exact_gradients_off_policy(golden) -> None:
    case = golden("kl/exact_gradients_off_policy")
    pi, ref, old = (torch.tensor(case["inputs"][key], dtype=F64) for key in ("pi", "ref", "old"))

    def in_loss(estimator: object) -> torch.Tensor:
        return expected_gradient(
            softmax_rows,
            pi.log(),
            probability=old,
            estimator=estimator,
            ref=ref.log()[:, None],
            old=old.log()[:, None],
            credit=torch.zeros(3, 1, dtype=F64),
        )

    want = case["expected"]
    assert_matches(in_loss(KLUnbiased()), want["grad_ratio_times_k3"])
    # KLUnbiased is written as sg[ratio]·k2 in the backward pass: the same numbers.
    assert_matches(in_loss(KLUnbiased()), want["grad_sg_ratio_times_k2"])
    assert_matches(in_loss(KLUnbiased()), want["grad_kl_reverse"])
    assert_matches(in_loss(RatioTimesK2()), want["grad_ratio_times_k2_live"])
    assert_matches(in_loss(KLSquare()), want["grad_k2_uncorrected"])
    assert_matches(in_loss(KLStraightThrough()), want["grad_k2_uncorrected"])
    assert_matches(in_loss(KLNaive()), want["grad_k3_naive"])


def two_steps(parameters: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [4, 2] of the outcomes (0,0), (0,1), (1,0), (1,1)."""
    first = parameters[:2].log_softmax(0)
    second = parameters[2:].view(2, 2).log_softmax(1)
    return torch.stack([first.repeat_interleave(2), second.flatten()], dim=1)


def test_exact_gradients_two_step(golden) -> None:
    case = golden("kl/exact_gradients_two_step")
    inputs, want = case["inputs"], case["expected"]
    flat = [*inputs["step1"], *inputs["step2"][0], *inputs["step2"][1]]
    flat_ref = [*inputs["ref1"], *inputs["ref2"][0], *inputs["ref2"][1]]
    parameters = torch.tensor(flat, dtype=F64).log()
    ref = two_steps(torch.tensor(flat_ref, dtype=F64).log())
    logp = two_steps(parameters)
    probability = logp.sum(1).exp()
    assert_matches((probability * k1(logp, ref).sum(1)).sum(), want["kl_sequence"])

    def in_loss(estimator: object) -> torch.Tensor:
        return expected_gradient(
            two_steps,
            parameters,
            probability=probability,
            estimator=estimator,
            ref=ref,
            credit=torch.zeros(4, 2, dtype=F64),
        )

    assert_matches(in_loss(KLSquare()), want["grad_token_k2"])
    assert_matches(in_loss(KLUnbiased()), want["grad_token_ratio_k3"])
    assert_matches(in_loss(KLSequenceSquare()), want["grad_sequence_k2"])
    to_go = k1(logp, ref).flip(1).cumsum(1).flip(1)
    in_reward = expected_gradient(two_steps, parameters, probability=probability, credit=-to_go)
    assert_matches(in_reward, want["grad_k1_return_to_go_in_reward"])
    assert_matches(in_reward, want["grad_kl_sequence"])


def test_full_vocabulary(golden) -> None:
    case = golden("kl/full_vocab")
    pi, ref = (torch.tensor(case["inputs"][key], dtype=F64) for key in ("pi", "ref"))
    assert_matches(full_kl(pi.log(), ref.log()), case["expected"]["kl"])


@pytest.mark.parametrize("name", ["entropy/from_logits_T1", "entropy/from_logits_T0.7"])
def test_entropy_from_logits(golden, name: str) -> None:
    case = golden(name)
    inputs, want = case["inputs"], case["expected"]
    logits = torch.tensor(inputs["logits"], dtype=F64, requires_grad=True)
    logp, entropy = logp_and_entropy(
        logits, torch.tensor(inputs["token"]), temperature=inputs["temperature"]
    )
    entropy.backward()
    assert_matches(logp, want["logp"])
    assert_matches(entropy, want["entropy"])
    assert_matches(logits.grad, want["grad_entropy_wrt_logits"])
