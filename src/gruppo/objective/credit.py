"""Credit: how much better than expected was a completion, or a token of it?

This module collects all estimators (``credit_group``, ``credit_passk``, ``credit_token``) under
one name and adds the two wrappers that modify another estimator. An estimator is a frozen record
that is called once per rollout batch with ``(rollout, evidence)``; it reads rewards and never
computes one, and it never sees the live policy.

| record | advantage |
|---|---|
| ``Grpo`` | (R − μ)/(σ + eps) |
| ``DrGrpo`` | R − μ |
| ``Rloo`` | R − mean of the others |
| ``BatchStd`` | (R − μ)/(σ of the batch + eps) |
| ``Gpg`` | α(R − μ)/f_norm |
| ``MaxRl`` | (R − μ)/μ |
| ``Remax`` | R − R of a greedy completion |
| ``Opo`` | R − length-weighted mean |
| ``Gdpo`` | each reward function normalised, summed, scaled by the batch |
| ``PasskBest``, ``PasskAnalytic`` | pass@k of the group |
| ``Process`` | normalised step rewards, summed forward |
| ``ReinforcePP``, ``ReinforcePPBaseline`` | whitened over the tokens of the batch |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from gruppo.objective.credit_base import (
    Credit,
    check_not_negative,
    combine_parts,
    dead_groups,
    require,
)
from gruppo.objective.credit_group import (
    BatchStd,
    DrGrpo,
    Gdpo,
    Gpg,
    Grpo,
    MaxRl,
    Opo,
    Remax,
    Rloo,
)
from gruppo.objective.credit_passk import PasskAnalytic, PasskBest
from gruppo.objective.credit_token import Process, ReinforcePP, ReinforcePPBaseline
from gruppo.objective.token import LOG_RATIO_LIMIT
from gruppo.types import Evidence, Rollout

__all__ = [
    "BatchStd",
    "Credit",
    "DrGrpo",
    "Gdpo",
    "Gpg",
    "Grpo",
    "KLInReward",
    "MaxRl",
    "Opo",
    "PasskAnalytic",
    "PasskBest",
    "PlainCredit",
    "Process",
    "ReinforcePP",
    "ReinforcePPBaseline",
    "Remax",
    "Reweight",
    "Rloo",
    "combine_parts",
    "dead_groups",
    "innermost",
    "outcome",
    "reads_total",
]

PlainCredit = (
    Grpo
    | DrGrpo
    | Rloo
    | BatchStd
    | Gpg
    | MaxRl
    | Remax
    | Opo
    | Gdpo
    | PasskBest
    | PasskAnalytic
    | Process
    | ReinforcePP
    | ReinforcePPBaseline
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KLInReward:
    """Subtracts β·Σ_t (log π_old − log π_ref) from each row's reward, then asks ``credit``.

    The sum runs over trained tokens, with log-ratios clamped to ±20 per token. k1 in the reward
    has the gradient of the true sequence KL. Refused around a credit that does not read the total
    reward (``Gdpo``, ``Process``), or cannot take what the penalty makes of it (``PasskAnalytic``
    binary rewards only, ``MaxRl`` no negative ones). Source: RLOO, arXiv 2402.14740; ReMax, arXiv
    2310.10505 (whose greedy reward stays without penalty).
    """

    kind: Literal["kl_in_reward"] = "kl_in_reward"
    credit: PlainCredit | Credit
    beta: float

    __pydantic_config__: ClassVar = {"extra": "forbid", "arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        check_not_negative("beta", self.beta)
        inner = innermost(self.credit)
        if not reads_total(inner):
            raise ValueError(
                f"credit = {self.credit!r}: it does not read the total reward, so a KL penalty "
                "in it has no effect; leave kl_in_reward out and use a KL term in the loss"
            )
        if isinstance(inner, PasskAnalytic | MaxRl):
            wanted = "rewards of 0 and 1" if isinstance(inner, PasskAnalytic) else "rewards ≥ 0"
            raise ValueError(
                f"credit = {self.credit!r}: it needs {wanted}, and a KL penalty makes other ones "
                "of them; leave kl_in_reward out and use a KL term in the loss"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What ``credit`` needs, and both policies' log-probabilities."""
        return self.credit.needs | {"old_logp", "ref_logp"}

    @property
    def min_group(self) -> int:
        """As ``credit``."""
        return self.credit.min_group

    @property
    def centred(self) -> bool:
        """As ``credit``."""
        return self.credit.centred

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Tensor:
        """Advantages of ``credit`` for the penalised rewards."""
        old = require(evidence.old_logp, "evidence.old_logp", "credit kl_in_reward")
        ref = require(evidence.ref_logp, "evidence.ref_logp", "credit kl_in_reward")
        k1 = (old - ref).where(rollout.mask.cpu(), 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        total = rollout.total.double() - self.beta * k1.sum(1)
        return self.credit(replace(rollout, total=total), evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reweight:
    """Limits advantages to ±clip, then scales positive and negative ones differently.

    ``neg_scale < 1`` damps negative gradients; ``pos_scale = 0.1`` keeps diversity (reinforcing
    mostly negative samples, arXiv 2506.01347). It changes the sum over a group, so a check of
    group sums belongs before it.

    Example:
        >>> Reweight(credit=DrGrpo(), neg_scale=0.5)(outcome([1.0, 0.0], [0, 0]), Evidence())
        tensor([ 0.5000, -0.2500], dtype=torch.float64)
    """

    kind: Literal["reweight"] = "reweight"
    credit: PlainCredit | KLInReward | Credit
    clip: float | None = None
    pos_scale: float = 1.0
    neg_scale: float = 1.0

    __pydantic_config__: ClassVar = {"extra": "forbid", "arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        check_not_negative("pos_scale", self.pos_scale)
        check_not_negative("neg_scale", self.neg_scale)
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(f"clip = {self.clip} must be positive, or left away for no limit")

    @property
    def needs(self) -> frozenset[str]:
        """As ``credit``."""
        return self.credit.needs

    @property
    def min_group(self) -> int:
        """As ``credit``."""
        return self.credit.min_group

    @property
    def centred(self) -> bool:
        """As ``credit`` if nothing is clipped and both scales agree, else False."""
        return self.credit.centred and self.clip is None and self.pos_scale == self.neg_scale

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Tensor:
        """Advantages [B] or [B, T], as ``credit`` gives them."""
        advantage = self.credit(rollout, evidence)
        if self.clip is not None:
            advantage = advantage.clamp(-self.clip, self.clip)
        positive, negative = advantage * self.pos_scale, advantage * self.neg_scale
        return torch.where(advantage > 0.0, positive, negative)


def innermost(credit: object) -> object:
    """The estimator inside any number of ``KLInReward`` and ``Reweight``.

    >>> innermost(Reweight(credit=KLInReward(credit=Rloo(), beta=0.1))).kind
    'rloo'
    """
    while isinstance(credit, KLInReward | Reweight):
        credit = credit.credit
    return credit


def reads_total(credit: object) -> bool:
    """Whether the total reward reaches the advantages, not only which rows are scored.

    ``Gdpo`` reads the parts of the reward and ``Process`` its steps; what changes the total alone
    (a KL penalty, a shaping term, a truncation rule) does nothing to them.
    """
    return not isinstance(innermost(credit), Gdpo | Process)


def outcome(
    total: Sequence[float],
    group: Sequence[int],
    *,
    mask: Bool[Tensor, "B T"] | None = None,
    baseline: Sequence[float] | None = None,
) -> Rollout:
    """A rollout that holds just rewards: to use an estimator without sampling anything.

    Args:
        total: Reward of every row; NaN means unscored.
        group: Group id of every row, 0 … P−1.
        mask: Trained tokens; one token per row if left away.
        baseline: Greedy reward of every group, for ``Remax``.

    Returns:
        Rollout with zeros for tokens and log-probabilities, and no reward parts.
    """
    trained = torch.ones(len(total), 1, dtype=torch.bool) if mask is None else mask
    reward = torch.tensor(total, dtype=torch.float64)
    return Rollout(
        prompts=((),) * (max(group, default=-1) + 1),
        tokens=torch.zeros(trained.shape, dtype=torch.int64),
        mask=trained,
        engine_logp=torch.zeros(trained.shape),
        group=torch.tensor(group, dtype=torch.int64),
        total=reward,
        task=reward,
        parts=reward.new_zeros(len(total), 0),
        part_names=(),
        part_weights=reward.new_zeros(0),
        length=trained.sum(1),
        truncated=torch.zeros(len(total), dtype=torch.bool),
        steps=((),) * len(total),
        baseline=None if baseline is None else torch.tensor(baseline, dtype=torch.float64),
    )
