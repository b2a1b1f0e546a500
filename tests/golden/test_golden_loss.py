"""Golden losses: value and full gradient, through Objective, make_rows and compute_loss."""

import pytest
import torch

from gruppo.objective import (
    Cispo,
    ClipCov,
    Coefficients,
    Constant,
    DppoKl,
    DppoTv,
    DrGrpo,
    Dro,
    EntropyTerm,
    Gmpo,
    Gspo,
    GspoToken,
    KlCov,
    KlCovTokens,
    KLTerm,
    Luspo,
    Objective,
    OffPolicySequenceMask,
    PpoClip,
    PromptMean,
    Reinforce,
    RlooSeq,
    Sapo,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    TokenMask,
    TokenMean,
    TokenTruncate,
    TopEntropy,
    Vespo,
    engine_log_ratio,
    k3,
    log_ratio,
    row_mean,
    token_covariance,
)
from support.golden_loss import assert_matches, naive, ppo, required, run, unbiased

WEIGHTS = {
    "token_mean": TokenMean(),
    "seq_mean_token_mean": SeqMeanTokenMean(),
    "seq_mean_token_sum": SeqMeanTokenSum(),
    "constant": Constant(length=8),
    "prompt_mean": PromptMean(),
}


PPO = {"surrogate": ppo}


GSPO = {"surrogate": lambda i: Gspo(eps_low=i["eps_low"], eps_high=i["eps_high"])}


CISPO = {"surrogate": lambda i: Cispo(w_max=i["w_max"], w_min=i.get("w_min"))}


GMPO = {"surrogate": lambda i: Gmpo(eps_low=i["log_eps_low"], eps_high=i["log_eps_high"])}


LUSPO = {"surrogate": lambda i: Luspo(eps_low=i["eps_low"], eps_high=i["eps_high"])}


CASES = {
    "loss/ppo_clip_token_mean": PPO,
    "loss/ppo_clip_seq_mean_token_mean": PPO,
    "loss/ppo_clip_seq_mean_token_sum": PPO,
    "loss/ppo_clip_constant": PPO,
    "loss/ppo_clip_prompt_mean": PPO,
    "loss/ppo_clip_symmetric": PPO,
    "loss/ppo_dual_clip": {"surrogate": lambda i: ppo(i, dual_clip=i["dual_clip"])},
    "loss/ppo_two_sided_delta": {"surrogate": lambda i: ppo(i, delta=i["delta"])},
    "loss/reinforce": {"surrogate": lambda i: Reinforce()},
    "loss/reinforce_seq_sum": {"surrogate": lambda i: Reinforce()},
    "loss/rloo_seq_ratio": {
        "surrogate": lambda i: RlooSeq(eps_low=i["eps_low"], eps_high=i["eps_high"])
    },
    "loss/cispo_wmax5": CISPO,
    "loss/cispo_wmax2": CISPO,
    "loss/cispo_two_sided_verl": CISPO,
    "loss/cispo_bypass_wmax4": {"surrogate": lambda i: Cispo(w_max=i["w_max"], bypass=True)},
    "loss/gspo": GSPO,
    "loss/gspo_wide": GSPO,
    "loss/gspo_token_level_adv": {
        "surrogate": lambda i: GspoToken(eps_low=i["eps_low"], eps_high=i["eps_high"])
    },
    "loss/gmpo_0.4": GMPO,
    "loss/gmpo_0.1": GMPO,
    "loss/sapo": {"surrogate": lambda i: Sapo(tau_pos=i["tau_pos"], tau_neg=i["tau_neg"])},
    "loss/vespo": {
        "surrogate": lambda i: Vespo(
            k_pos=i["k_pos"],
            lambda_pos=i["lambda_pos"],
            k_neg=i["k_neg"],
            lambda_neg=i["lambda_neg"],
        )
    },
    "loss/luspo": LUSPO,
    "loss/luspo_wide": LUSPO,
    "loss/clip_cov": {
        "surrogate": ppo,
        "select": lambda i: ClipCov(
            fraction=i["fraction"],
            low=i["cov_lb"],
            high=i["cov_ub"],
            eps_low=i["eps_low"],
            eps_high=i["eps_high"],
        ),
    },
    "loss/kl_cov": {
        "surrogate": lambda i: KlCov(kappa=i["kl_coef"]),
        "select": lambda i: KlCovTokens(fraction=i["fraction"]),
    },
    "loss/dppo_tv": {
        "surrogate": lambda i: DppoTv(delta_low=i["delta_low"], delta_high=i["delta_high"])
    },
    "loss/dppo_bypass_kl": {
        "surrogate": lambda i: DppoKl(
            delta_low=i["delta_low"], delta_high=i["delta_high"], kl_tau=i["kl_tau"]
        )
    },
    "loss/high_entropy_tokens": {
        "surrogate": ppo,
        "select": lambda i: TopEntropy(fraction=i["keep_fraction"]),
    },
    "loss/opsm": {"surrogate": ppo, "keep": lambda i: OffPolicySequenceMask(delta=i["delta"])},
    "loss/entropy_bonus": {
        "surrogate": ppo,
        "entropy": lambda i: EntropyTerm(coef=i["entropy_coef"]),
    },
    "loss/ppo_clip_with_kl": {"surrogate": ppo, "kl": unbiased},
    "loss/ppo_clip_with_kl_naive": {"surrogate": ppo, "kl": naive},
    "loss/ppo_clip_tis": {
        "surrogate": ppo,
        "correction": lambda i: TokenTruncate(max=i["c_max"]),
    },
    "loss/ppo_clip_icepop": {
        "surrogate": ppo,
        "correction": lambda i: TokenMask(min=i["c_min"], max=i["c_max"]),
    },
    "loss/decoupled_ppo": {
        "surrogate": ppo,
        "correction": lambda i: TokenTruncate(max=i["behav_cap"]),
    },
    "loss/bypass_old_is_rollout": {
        "surrogate": lambda i: PpoClip(eps_low=i["eps_low"], eps_high=i["eps_high"], bypass=True)
    },
    "loss/dro": {"surrogate": lambda i: Dro(b=i["beta"])},
}


def built(parts: dict, inputs: dict) -> Objective:
    made = {name: make(inputs) for name, make in parts.items()}
    rows_only = made["surrogate"].level == "sequence" or "token_advantages" in inputs
    agg = "seq_mean_token_mean" if rows_only else inputs.get("agg", "token_mean")
    return Objective(credit=DrGrpo(), weights=WEIGHTS[agg], **made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(golden, name: str, dtype: torch.dtype) -> None:
    case = golden(name)
    tol = case["tol"] if dtype == torch.float64 else 1e-5
    loss, grad = run(built(CASES[name], case["inputs"]), case["inputs"], dtype)
    assert_matches(loss.value, case["expected"]["loss"], tol)
    assert_matches(grad, case["expected"]["grad_logp"], tol)


def test_clip_fractions(golden) -> None:
    case = golden("metric/clip_fractions")
    inputs, want = case["inputs"], case["expected"]
    objective = Objective(credit=DrGrpo(), surrogate=ppo(inputs), weights=TokenMean())
    loss, _ = run(objective, inputs)
    mask = torch.tensor(inputs["mask"]).bool()
    low, high = loss.tokens.clipped_low.double(), loss.tokens.clipped_high.double()
    ratio = loss.tokens.ratio
    assert_matches(torch.where(mask, ratio, 0), want["ratio"], 1e-6)
    assert_matches(low, want["low"], 0)
    assert_matches(high, want["high"], 0)
    assert_matches(low[mask].mean(), want["clip_frac_low"], 1e-6)
    assert_matches(high[mask].mean(), want["clip_frac_high"], 1e-6)
    assert_matches((low + high)[mask].mean(), want["clip_frac"], 1e-6)
    assert_matches(ratio[mask].mean(), want["ratio_mean"], 1e-6)
    drift = k3(required(inputs, torch.float64, "old_logp"), required(inputs, torch.float64, "logp"))
    assert_matches(drift[mask].mean(), want["approx_kl_k3"], 1e-6)


@pytest.mark.parametrize("name", ["loss/gspo", "loss/gspo_wide"])
def test_length_normalised_ratio(golden, name: str) -> None:
    case = golden(name)
    logp, old, mask = (
        required(case["inputs"], torch.float64, key) for key in ("logp", "old_logp", "mask")
    )
    ratio = row_mean(log_ratio(logp, old), mask.bool()).exp().squeeze(1)
    assert_matches(ratio, case["expected"]["seq_ratio"], 1e-6)


def test_vespo_weight(golden) -> None:
    case = golden("loss/vespo")
    inputs = case["inputs"]
    _, grad = run(built(CASES["loss/vespo"], inputs), inputs)
    # The gradient of a token is -φ·A/N.
    phi = -grad[:, 0] * 12 / torch.tensor(inputs["advantages"], dtype=torch.float64)
    assert_matches(phi, case["expected"]["phi"], 1e-6)


def test_clip_cov_eligible_tokens(golden) -> None:
    case = golden("loss/clip_cov")
    inputs = case["inputs"]
    logp, old, mask, advantage = (
        required(inputs, torch.float64, key) for key in ("logp", "old_logp", "mask", "advantages")
    )
    spread = advantage[:, None].expand(mask.shape)
    assert_matches(token_covariance(logp, spread, mask.bool()), case["expected"]["cov"], 1e-6)
    select = CASES["loss/clip_cov"]["select"](inputs)
    chosen = select(logp, None, old_logp=old, advantage=spread, mask=mask.bool(), seed=3)
    assert_matches(chosen.double(), case["expected"]["eligible"], 0)


def test_kl_cov_selected_tokens(golden) -> None:
    case = golden("loss/kl_cov")
    inputs = case["inputs"]
    logp, old, mask, advantage = (
        required(inputs, torch.float64, key) for key in ("logp", "old_logp", "mask", "advantages")
    )
    spread = advantage[:, None].expand(mask.shape)
    select = KlCovTokens(fraction=inputs["fraction"])
    chosen = select(logp, None, old_logp=old, advantage=spread, mask=mask.bool(), seed=0)
    assert_matches(chosen.double(), case["expected"]["selected"], 0)


def test_high_entropy_tokens_kept(golden) -> None:
    case = golden("loss/high_entropy_tokens")
    inputs = case["inputs"]
    loss, _ = run(built(CASES["loss/high_entropy_tokens"], inputs), inputs)
    assert_matches(loss.tokens.kept.double(), case["expected"]["kept"], 0)
    entropy = torch.tensor(inputs["entropy"], dtype=torch.float64)
    above = entropy >= case["expected"]["threshold"]
    assert torch.equal(above & torch.tensor(inputs["mask"]).bool(), loss.tokens.kept)


def test_opsm_rows_kept(golden) -> None:
    case = golden("loss/opsm")
    inputs = case["inputs"]
    loss, _ = run(built(CASES["loss/opsm"], inputs), inputs)
    mask = torch.tensor(inputs["mask"]).bool()
    kept = torch.where(mask, loss.tokens.kept, True).all(dim=1)
    assert_matches(kept.double(), case["expected"]["kept"], 0)
    logp, old = (required(inputs, torch.float64, key) for key in ("logp", "old_logp"))
    assert_matches(row_mean(old - logp, mask).squeeze(1), case["expected"]["seq_kl"], 1e-6)


def test_entropy_bonus_mean(golden) -> None:
    case = golden("loss/entropy_bonus")
    loss, _ = run(built(CASES["loss/entropy_bonus"], case["inputs"]), case["inputs"])
    assert_matches(loss.entropy, case["expected"]["mean_entropy"], 1e-6)


def test_decoupled_behaviour_weight(golden) -> None:
    case = golden("loss/decoupled_ppo")
    inputs = case["inputs"]
    loss, _ = run(built(CASES["loss/decoupled_ppo"], inputs), inputs)
    assert_matches(loss.tokens.is_weight, case["expected"]["behav_weight"], 1e-6)


def test_rloo_sequence_ratio(golden) -> None:
    case = golden("loss/rloo_seq_ratio")
    logp, old, mask = (
        required(case["inputs"], torch.float64, key) for key in ("logp", "old_logp", "mask")
    )
    x = engine_log_ratio(logp, old, mask.bool())
    assert_matches(x.sum(1).exp(), case["expected"]["seq_ratio"], 1e-6)


def test_coefficients_come_from_the_objective() -> None:
    objective = Objective(
        credit=DrGrpo(),
        surrogate=PpoClip(),
        weights=TokenMean(),
        kl=KLTerm(beta=0.1),
        entropy=EntropyTerm(coef=0.01),
    )
    assert objective.coefficients == Coefficients(kl=0.1, entropy=0.01)
