"""Published variants, ready to use, and the list of those that still lack a part.

A preset is an ``Objective`` together with the rollout settings that belong to the variant. It
fixes the loss, not the run: learning rate, batch and budget stay the recipe's. Where a paper
leaves something open, ``differs`` says what was chosen. Objectives of your own need no entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gruppo.objective.composition import Objective
from gruppo.objective.control import AdaptiveEntropy
from gruppo.objective.correction import SequenceMask, TokenMask, TokenTruncate
from gruppo.objective.credit import (
    BatchStd,
    DrGrpo,
    Gdpo,
    Gpg,
    Grpo,
    KLInReward,
    MaxRl,
    Opo,
    PasskAnalytic,
    PasskBest,
    Process,
    ReinforcePP,
    ReinforcePPBaseline,
    Remax,
    Rloo,
)
from gruppo.objective.entropy import EntropyTerm
from gruppo.objective.keep import ClipCov, KlCovTokens, OffPolicySequenceMask, TopEntropy
from gruppo.objective.kl import KLNaive, KLSquare, KLTerm, KLUnbiased
from gruppo.objective.sequence import Gmpo, Gspo, GspoToken, Luspo, RlooSeq, Vespo
from gruppo.objective.surrogate import Cispo, Importance, PpoClip, Reinforce, Sapo
from gruppo.objective.trust import DppoKl, DppoTv, Dro, KlCov
from gruppo.objective.weights import (
    Constant,
    LocalTokenMean,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    TokenMean,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A variant: its objective, where it comes from, and how it differs from its source.

    ``rollout`` holds settings of the rollout that belong to the variant: ``group_size`` (int),
    ``filter`` of dead groups ("keep", "skip", "drop" or "resample"), ``overlong_buffer`` (tokens
    of the completion budget over which length is punished), ``mask_truncated`` (bool),
    ``reference_sync_steps`` (int), ``greedy_baseline`` (bool).
    """

    objective: Objective
    source: str
    differs: str
    rollout: Mapping[str, object] = field(default_factory=dict)


_SYMMETRIC = PpoClip(eps_low=0.2, eps_high=None)
_HIGHER = PpoClip(eps_low=0.2, eps_high=0.28)

PRESETS: dict[str, Preset] = {
    "default": Preset(
        objective=Objective(credit=Grpo(), surrogate=_HIGHER, weights=TokenMean()),
        source=(
            "gruppo: GRPO (arXiv 2402.03300) with clip-higher and the token mean of DAPO (arXiv "
            "2503.14476)"
        ),
        differs="No KL term; one optimizer step per rollout makes the clip range inactive.",
        rollout={"group_size": 8, "filter": "skip"},
    ),
    "grpo": Preset(
        objective=Objective(
            credit=Grpo(),
            surrogate=_SYMMETRIC,
            weights=SeqMeanTokenMean(),
            kl=KLTerm(beta=0.04, estimator=KLNaive()),
        ),
        source="DeepSeekMath, arXiv 2402.03300",
        differs="Clip range and divisor of the standard deviation are not published: .2 and n - 1.",
    ),
    "process": Preset(
        objective=Objective(
            credit=Process(),
            surrogate=_SYMMETRIC,
            weights=SeqMeanTokenMean(),
            kl=KLTerm(beta=0.04, estimator=KLNaive()),
        ),
        source="DeepSeekMath, arXiv 2402.03300, process supervision",
        differs="Needs rewards with step ends; a program or model that gives them is the user's.",
    ),
    "r1_zero": Preset(
        objective=Objective(
            credit=Grpo(),
            surrogate=PpoClip(eps_low=0.2, eps_high=10.0),
            weights=SeqMeanTokenMean(),
            kl=KLTerm(beta=0.001, estimator=KLNaive()),
        ),
        source="DeepSeek-R1, arXiv 2501.12948",
        differs=(
            "The printed ε = 10 is read as an upper bound that hardly ever binds; the printed "
            "ratio of whole sequences as the usual one of tokens."
        ),
        rollout={"reference_sync_steps": 400},
    ),
    "dr_grpo": Preset(
        objective=Objective(credit=DrGrpo(), surrogate=_SYMMETRIC, weights=Constant()),
        source="Dr. GRPO, arXiv 2503.20783",
        differs="The constant is the completion budget, as in the authors' code.",
    ),
    "dapo": Preset(
        objective=Objective(credit=Grpo(), surrogate=_HIGHER, weights=TokenMean()),
        source="DAPO, arXiv 2503.14476",
        differs=(
            "The buffer is the published one (4,096 of 20,480 tokens): scale it with the budget. "
            "Truncated rows are trained, as in the authors' script; set mask_truncated for "
            "overlong filtering."
        ),
        rollout={"filter": "resample", "overlong_buffer": 4096},
    ),
    "bnpo": Preset(
        objective=Objective(credit=Grpo(), surrogate=_SYMMETRIC, weights=LocalTokenMean()),
        source='TRL, loss_type "bnpo"',
        differs="For comparison only: the loss depends on how rows are split into micro-batches.",
    ),
    "gspo": Preset(
        objective=Objective(credit=Grpo(), surrogate=Gspo(), weights=SeqMeanTokenMean()),
        source="GSPO, arXiv 2507.18071",
        differs="The sequence ratio is differentiated directly, without the token form's detour.",
    ),
    "gspo_token": Preset(
        objective=Objective(credit=Grpo(), surrogate=GspoToken(), weights=SeqMeanTokenMean()),
        source="GSPO-token, arXiv 2507.18071",
        differs="Equal to gspo with this credit; meant for a credit per token.",
    ),
    "cispo": Preset(
        objective=Objective(credit=Grpo(), surrogate=Cispo(w_max=5.0), weights=TokenMean()),
        source="MiniMax-M1, arXiv 2506.13585",
        differs=(
            "The upper bound is not published: 5 lies in the range that ScaleRL found to work "
            "alike."
        ),
    ),
    "gmpo": Preset(
        objective=Objective(credit=Grpo(), surrogate=Gmpo(), weights=SeqMeanTokenMean()),
        source="GMPO, arXiv 2507.20673",
        differs="As published.",
    ),
    "sapo": Preset(
        objective=Objective(credit=Grpo(), surrogate=Sapo(), weights=SeqMeanTokenMean()),
        source="SAPO, arXiv 2511.20347",
        differs="As published.",
    ),
    "vespo": Preset(
        objective=Objective(credit=Grpo(), surrogate=Vespo(), weights=TokenMean()),
        source="VESPO, arXiv 2602.10693",
        differs=(
            "With an external engine set surrogate.bypass, which puts its mismatch into the weight."
        ),
    ),
    "luspo": Preset(
        objective=Objective(credit=Grpo(), surrogate=Luspo(), weights=SeqMeanTokenMean()),
        source="LUSPO, arXiv 2602.05261",
        differs="As published.",
    ),
    "gpg": Preset(
        objective=Objective(credit=Gpg(), surrogate=Reinforce(), weights=TokenMean()),
        source="GPG, arXiv 2504.02546",
        differs=(
            "Dead groups stay in the batch and are made up for by α; resampling below a live "
            "share of .6 is not done."
        ),
        rollout={"filter": "skip"},
    ),
    "opo": Preset(
        objective=Objective(credit=Opo(), surrogate=Reinforce(), weights=TokenMean()),
        source="OPO, arXiv 2505.23585",
        differs="Exact on-policy: use one optimizer step per rollout.",
    ),
    "rloo": Preset(
        objective=Objective(
            credit=KLInReward(credit=Rloo(), beta=0.05),
            surrogate=Reinforce(),
            weights=SeqMeanTokenSum(),
        ),
        source="RLOO, arXiv 2402.14740",
        differs="β = .05; the paper has .03 and .10.",
    ),
    "rloo_clip": Preset(
        objective=Objective(
            credit=KLInReward(credit=Rloo(), beta=0.05),
            surrogate=RlooSeq(),
            weights=SeqMeanTokenMean(),
        ),
        source="RLOO, arXiv 2402.14740, with the clipped sequence ratio of TRL's RLOO trainer",
        differs="For several inner updates; one loss per completion is averaged over completions.",
    ),
    "remax": Preset(
        objective=Objective(
            credit=KLInReward(credit=Remax(), beta=0.05),
            surrogate=Reinforce(),
            weights=SeqMeanTokenSum(),
        ),
        source="ReMax, arXiv 2310.10505",
        differs="β is chosen as for rloo. The greedy completion's reward carries no KL penalty.",
        rollout={"greedy_baseline": True},
    ),
    "rpp": Preset(
        objective=Objective(
            credit=ReinforcePP(beta=0.01), surrogate=_SYMMETRIC, weights=TokenMean()
        ),
        source="REINFORCE++, arXiv 2501.03262",
        differs="As published, γ = 1.",
    ),
    "rpp_baseline": Preset(
        objective=Objective(
            credit=ReinforcePPBaseline(),
            surrogate=_SYMMETRIC,
            weights=TokenMean(),
            kl=KLTerm(beta=0.001, estimator=KLSquare()),
        ),
        source="REINFORCE++-baseline, arXiv 2501.03262",
        differs="β is the lower end of the published .001 to .01.",
    ),
    "lite_ppo": Preset(
        objective=Objective(
            credit=BatchStd(of="rewards"), surrogate=_SYMMETRIC, weights=TokenMean()
        ),
        source="Lite PPO, arXiv 2508.08221",
        differs="No critic here: group mean, batch standard deviation.",
    ),
    "gdpo": Preset(
        objective=Objective(credit=Gdpo(), surrogate=_HIGHER, weights=TokenMean()),
        source="GDPO, arXiv 2601.05242",
        differs=(
            "Standard deviation of the batch by rows; needs several reward parts to differ from "
            "grpo."
        ),
    ),
    "clip_cov": Preset(
        objective=Objective(
            credit=Grpo(),
            surrogate=PpoClip(eps_low=1.0, eps_high=1.0),
            weights=TokenMean(),
            select=ClipCov(),
        ),
        source="Clip-Cov, arXiv 2505.22617",
        differs="Tokens are drawn over the whole optimizer step, not per micro-batch.",
    ),
    "kl_cov": Preset(
        objective=Objective(
            credit=Grpo(), surrogate=KlCov(), weights=TokenMean(), select=KlCovTokens()
        ),
        source="KL-Cov, arXiv 2505.22617",
        differs="Tokens are ranked over the whole optimizer step, not per micro-batch.",
    ),
    "tokens_80_20": Preset(
        objective=Objective(
            credit=Grpo(), surrogate=_HIGHER, weights=TokenMean(), select=TopEntropy(fraction=0.2)
        ),
        source="High-entropy minority tokens, arXiv 2506.01939",
        differs=(
            "The quantile is taken over the whole optimizer step; dropped tokens stay in the count."
        ),
        rollout={"filter": "resample", "overlong_buffer": 4096},
    ),
    "skywork": Preset(
        objective=Objective(
            credit=Grpo(),
            surrogate=_SYMMETRIC,
            weights=TokenMean(),
            entropy=EntropyTerm(adaptive=AdaptiveEntropy(target=0.2)),
        ),
        source="Skywork-OR1, arXiv 2505.22312",
        differs="Stages of the completion budget are the run's business.",
        rollout={"filter": "drop"},
    ),
    "intellect2": Preset(
        objective=Objective(
            credit=Grpo(),
            surrogate=PpoClip(eps_low=0.2, eps_high=None, delta=4.0),
            weights=TokenMean(),
            kl=KLTerm(beta=0.001, estimator=KLUnbiased()),
        ),
        source="INTELLECT-2, arXiv 2505.07291, two-sided clip",
        differs="Synchronous; the KL gradient is the unbiased one; no offline difficulty filter.",
    ),
    "icepop": Preset(
        objective=Objective(
            credit=DrGrpo(),
            surrogate=Importance(),
            weights=TokenMean(),
            correction=TokenMask(min=0.5, max=5.0),
        ),
        source="IcePop, arXiv 2510.18855, with the unclipped importance loss of INTELLECT-3",
        differs="Synchronous. Without an external engine every correction weight is 1.",
    ),
    "tis": Preset(
        objective=Objective(
            credit=Grpo(), surrogate=_HIGHER, weights=TokenMean(), correction=TokenTruncate(max=2.0)
        ),
        source="Truncated importance sampling, Yao et al., 2025",
        differs="The default objective, corrected for an external engine.",
    ),
    "mis": Preset(
        objective=Objective(
            credit=Grpo(), surrogate=_HIGHER, weights=TokenMean(), correction=SequenceMask(max=3.0)
        ),
        source="Masked importance sampling, Li et al., 2025",
        differs="The default objective, corrected for an external engine; bound as in TRL.",
    ),
    "dppo": Preset(
        objective=Objective(credit=Grpo(), surrogate=DppoTv(), weights=TokenMean()),
        source="DPPO, arXiv 2602.04879",
        differs="Total-variation mask of .2 both ways, no cap on the ratio.",
    ),
    "prime_default": Preset(
        objective=Objective(credit=DrGrpo(), surrogate=DppoKl(), weights=TokenMean()),
        source="prime-rl, default loss",
        differs="Synchronous. Ratio and mask are taken against the engine.",
    ),
    "v32": Preset(
        objective=Objective(
            credit=Grpo(),
            surrogate=_SYMMETRIC,
            weights=SeqMeanTokenMean(),
            keep=OffPolicySequenceMask(delta=0.5),
            kl=KLTerm(beta=0.001, estimator=KLUnbiased()),
        ),
        source="DeepSeek-V3.2, arXiv 2512.02556",
        differs=(
            "Without keep-routing (the engine's expert choices forced in training) and without a "
            "kept sampling mask: sample with top_p = 1. δ and β are not published: TRL's .5, and "
            ".001."
        ),
    ),
    "passk_best": Preset(
        objective=Objective(credit=PasskBest(), surrogate=_SYMMETRIC, weights=TokenMean()),
        source="Pass@k policy optimisation, arXiv 2503.19595",
        differs=(
            "The best completion's lead over the second is divided by the group's standard "
            "deviation."
        ),
    ),
    "passk_analytic": Preset(
        objective=Objective(credit=PasskAnalytic(k=4), surrogate=_SYMMETRIC, weights=TokenMean()),
        source="Pass@k training, arXiv 2508.10751",
        differs="For binary rewards and groups of at least k = 4.",
    ),
    "maxrl": Preset(
        objective=Objective(credit=MaxRl(), surrogate=Reinforce(), weights=TokenMean()),
        source="MaxRL, arXiv 2602.02710",
        differs="For rewards that are not negative.",
    ),
    "two_grpo": Preset(
        objective=Objective(credit=Grpo(), surrogate=_SYMMETRIC, weights=SeqMeanTokenMean()),
        source="2-GRPO, arXiv 2510.00977",
        differs="No KL term.",
        rollout={"group_size": 2},
    ),
    "dro": Preset(
        objective=Objective(credit=DrGrpo(), surrogate=Dro(b=0.1), weights=TokenMean()),
        source="DRO, arXiv 2405.19107, in verl's form",
        differs="Group mean instead of a learned value; b is not published: .1.",
    ),
}
"""Variants whose parts all exist, by name."""

PLANNED: dict[str, str] = {
    "ppo": "a critic: value head, value loss in the update, GAE as credit",
    "vapo": (
        "a critic with value pre-training, length-adaptive GAE as credit, the positive-example "
        "NLL term"
    ),
    "otb": (
        "Σπ² of every generated token recorded by the engine, and the optimal token baseline as "
        "credit"
    ),
    "rae": "self-play environments with roles, and a credit that keeps state between steps",
    "scalerl": (
        "streaming rollouts with staleness up to 8, forced interruption, no-positive resampling"
    ),
    "decoupled": "rollouts that overlap training: without staleness its two ratios coincide",
    "intellect3": "rollouts that overlap training with staleness up to 8 (icepop is its loss)",
    "v32_routing": "the engine's expert choices recorded and forced in training (v32 is the rest)",
}
"""Variants that still miss a part, and which."""
