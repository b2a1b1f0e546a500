"""Credit estimators that give one advantage per completion from the rewards of its group.

They differ in the baseline (group mean, leave-one-out mean, length-weighted mean, a greedy
completion) and in the scale (group or batch standard deviation, mean, none). Rules common to all:
an unscored row (NaN reward) is out of every statistic and gets advantage 0; a dead group (fewer
than two scored rows, or equal rewards) gets exactly 0. Pass@k and token-level estimators live
elsewhere (credit_passk, credit_token), and so does anything that changes rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.objective.credit_base import (
    batch_std,
    check_ddof,
    check_not_negative,
    deviations,
    group_count,
    group_mean,
    group_std,
    group_sum,
    live_rows,
    require,
)
from gruppo.objective.masks import foreign
from gruppo.types import ZERO_TOL, Evidence, Rollout

NOTHING: frozenset[str] = frozenset()


def _normalised(
    total: Float[Tensor, "B"], group: Int[Tensor, "B"], *, ddof: int, eps: float, zero_tol: float
) -> Float[Tensor, "B"]:
    """(R − mean) / (std + eps) within each group; 0 on unscored rows and in dead groups."""
    live = live_rows(total, group, zero_tol=zero_tol)
    deviation = deviations(total, group, live)
    std = group_std(deviation, group, keep=live, ddof=ddof)
    return (deviation / (std[group] + eps)).where(live, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grpo:
    """Reward minus group mean, over the group's standard deviation: A = (R − μ) / (σ + eps).

    Every live group has the same energy (ΣA² → G − 1), so rare successes are amplified, and |A| ≤
    (G − 1)/√G. Source: DeepSeekMath, arXiv 2402.03300, §4.1.2 (which leaves the divisor of σ open;
    ``ddof = 1`` is what TRL, verl and OpenRLHF use). Groups whose rewards differ by no more than
    ``zero_tol`` are dead.

    Example:
        >>> from gruppo.objective.credit import outcome
        >>> Grpo(eps=0.0)(outcome([1.0, 0.0], [0, 0]), Evidence())
        tensor([ 0.7071, -0.7071], dtype=torch.float64)
    """

    kind: Literal["grpo"] = "grpo"
    ddof: int = 1
    eps: float = 1e-4
    zero_tol: float = ZERO_TOL

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = NOTHING
    min_group: ClassVar[int] = 2
    centred: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ddof(self.ddof)
        check_not_negative("eps", self.eps)
        check_not_negative("zero_tol", self.zero_tol)

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B"]:
        """Advantages [B]."""
        return _normalised(
            rollout.total.double(),
            rollout.group,
            ddof=self.ddof,
            eps=self.eps,
            zero_tol=self.zero_tol,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrGrpo:
    """Reward minus group mean, not scaled: A = R − μ.

    Without σ the weight of a prompt with pass rate p falls from √(p(1−p)) to p(1−p), which removes
    the bias towards very easy and very hard prompts. Source: arXiv 2503.20783, §3.
    """

    kind: Literal["dr_grpo"] = "dr_grpo"

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = NOTHING
    min_group: ClassVar[int] = 2
    centred: ClassVar[bool] = True

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B"]:
        """Advantages [B]."""
        total = rollout.total.double()
        return deviations(total, rollout.group, live_rows(total, rollout.group))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rloo:
    """Reward minus the mean of the other rows: A_i = R_i − mean_{j≠i} R_j = n/(n−1) (R_i − μ).

    The baseline does not contain the row itself, so the gradient is unbiased. Source: arXiv
    2402.14740 (there with the KL penalty inside R: wrap it in ``KLInReward``).
    """

    kind: Literal["rloo"] = "rloo"

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = NOTHING
    min_group: ClassVar[int] = 2
    centred: ClassVar[bool] = True

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B"]:
        """Advantages [B]."""
        total, group = rollout.total.double(), rollout.group
        live = live_rows(total, group)
        count = group_count(live, group).double()
        scale = count / (count - 1).clamp(min=1)
        return deviations(total, group, live) * scale[group]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStd:
    """Reward minus group mean, over one standard deviation for the whole rollout batch.

    ``of = "rewards"``: σ of all rewards (Lite PPO, arXiv 2508.08221). ``of = "advantages"``: σ of
    all R − μ (ScaleRL, arXiv 2510.13786). The batch is all scored rows, dead groups included.
    ``ddof`` and ``eps`` as in ``Grpo``.
    """

    kind: Literal["batch_std"] = "batch_std"
    of: Literal["rewards", "advantages"] = "rewards"
    ddof: int = 1
    eps: float = 1e-4

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = NOTHING
    min_group: ClassVar[int] = 2
    centred: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ddof(self.ddof)
        check_not_negative("eps", self.eps)
        if self.of not in ("rewards", "advantages"):
            raise ValueError(f'of = "{self.of}" is unknown: use "rewards" or "advantages"')

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B"]:
        """Advantages [B]."""
        total, group = rollout.total.double(), rollout.group
        live = live_rows(total, group)
        deviation = deviations(total, group, live)
        values = {"rewards": total, "advantages": deviation}[self.of]
        std = batch_std(values[torch.isfinite(total)], ddof=self.ddof)
        return (deviation / (std + self.eps)).where(live, 0.0)


def gpg_alpha(total: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> float:
    """Scored rows over scored rows of live groups; 1 if no group is live.

    Source: GPG, arXiv 2504.02546 (its α undoes the dilution of the gradient by dead groups; verl
    counts rows with a non-zero reward instead).
    """
    live = int(live_rows(total, group).sum())
    return int(torch.isfinite(total).sum()) / live if live else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpg:
    """Reward minus group mean, rescaled for dead rows: A = α (R − μ) / f_norm.

    Source: GPG, arXiv 2504.02546; α as in ``gpg_alpha``.
    """

    kind: Literal["gpg"] = "gpg"
    f_norm: float = 1.0

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = NOTHING
    min_group: ClassVar[int] = 2
    centred: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_not_negative("f_norm", self.f_norm)
        if self.f_norm == 0.0:
            raise ValueError("f_norm = 0 would divide by zero: use a positive number, such as 1.0")

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B"]:
        """Advantages [B]."""
        total, group = rollout.total.double(), rollout.group
        scale = gpg_alpha(total, group) / self.f_norm
        return deviations(total, group, live_rows(total, group)) * scale


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxRl:
    """Reward minus group mean, over the group mean: A = (R − μ)/μ, 0 where μ = 0.

    Weights hard prompts by 1/μ; |A| ≤ n − 1. Only for rewards ≥ 0: with mixed signs μ may be
    arbitrarily close to 0 while rewards are not. A recipe whose settings can make a reward negative
    is refused; a reward function that does so all the same stops the run there. Source: MaxRL,
    arXiv 2602.02710.
    """

    kind: Literal["maxrl"] = "maxrl"

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = NOTHING
    min_group: ClassVar[int] = 2
    centred: ClassVar[bool] = True

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B"]:
        """Advantages [B]; ValueError if a scored reward is negative."""
        total, group = rollout.total.double(), rollout.group
        live = live_rows(total, group)
        negative = total[torch.isfinite(total) & (total < 0.0)]
        if negative.numel():
            raise ValueError(
                f"credit maxrl divides by the mean reward and needs rewards ≥ 0, but got "
                f"{float(negative[0])}: score in [0, 1] without penalties, or use another credit"
            )
        mean = group_mean(total, group, live)[group]
        return (deviations(total, group, live) / mean).where(live & (mean > 0.0), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remax:
    """Reward minus the reward of a greedy completion of the same prompt: A = R − R_greedy.

    Valid for a single completion per prompt, hence no dead-group rule. Rows whose greedy
    completion is unscored get 0. Source: ReMax, arXiv 2310.10505.
    """

    kind: Literal["remax"] = "remax"

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = frozenset({"greedy"})
    min_group: ClassVar[int] = 1
    centred: ClassVar[bool] = False

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B"]:
        """Advantages [B]; ValueError if the rollout has no greedy baseline."""
        baseline = require(rollout.baseline, "rollout.baseline (greedy rewards)", "credit remax")
        advantage = rollout.total.double() - baseline[rollout.group]
        return advantage.where(torch.isfinite(advantage), 0.0)


def length_weighted_mean(
    total: Float[Tensor, "B"], length: Int[Tensor, "B"], group: Int[Tensor, "B"]
) -> Float[Tensor, "P"]:
    """Σ length·R / Σ length over the scored rows of every group; NaN where that length is 0.

    It minimises the gradient's variance if the squared gradient norm of a row is proportional to
    its length. Source: OPO, arXiv 2505.23585.
    """
    weight = length.double().where(torch.isfinite(total), 0.0)
    return group_sum(weight * total.nan_to_num(0.0, 0.0, 0.0), group) / group_sum(weight, group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opo:
    """Reward minus the length-weighted mean reward of the group.

    Lengths are those of whole completions (an environment's tokens aside), so that a row which is
    masked for being truncated still shapes the baseline. A group whose completions are all empty
    gets 0. Meant for exact on-policy training without KL and entropy terms. Source: OPO, arXiv
    2505.23585.
    """

    kind: Literal["opo"] = "opo"

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = NOTHING
    min_group: ClassVar[int] = 2
    centred: ClassVar[bool] = False

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B"]:
        """Advantages [B]."""
        total, group = rollout.total.double(), rollout.group
        length = rollout.length - foreign(rollout).sum(1).to(rollout.length)
        baseline = length_weighted_mean(total, length, group)[group]
        return (total - baseline).where(live_rows(total, group) & torch.isfinite(baseline), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gdpo:
    """Every reward function is normalised in its group, then they are summed, then scaled.

    Z^k = group-normalised part k (as ``Grpo``), S = Σ_k w_k Z^k, A = (S − mean S)/(σ(S) + eps) with
    mean and σ over the scored rows of the batch. Unlike normalising the sum, it keeps apart
    combinations of parts whose sums coincide. A part that abstained has Z^k = 0. The total is read
    only for which rows are scored: shaping terms and truncation rules that change it do nothing
    here, and recipes that have them are refused. ``ddof`` as in ``Grpo``. Source: GDPO, arXiv
    2601.05242 (TRL: "normalize_then_sum"; verl whitens by tokens instead of rows).
    """

    kind: Literal["gdpo"] = "gdpo"
    ddof: int = 1
    eps: float = 1e-4

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = NOTHING
    min_group: ClassVar[int] = 2
    centred: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ddof(self.ddof)
        check_not_negative("eps", self.eps)

    def weighted(self, rollout: Rollout) -> Float[Tensor, "B"]:
        """S, the weighted sum of the group-normalised parts; 0 on unscored rows."""
        scored = torch.isfinite(rollout.total)
        parts = rollout.parts.double().where(scored[:, None], torch.nan)  # [B, K]
        total = torch.zeros_like(rollout.total, dtype=torch.float64)
        for part, weight in zip(parts.unbind(1), rollout.part_weights.tolist(), strict=True):
            total = total + weight * _normalised(
                part, rollout.group, ddof=self.ddof, eps=self.eps, zero_tol=ZERO_TOL
            )
        return total

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B"]:
        """Advantages [B]."""
        scored = torch.isfinite(rollout.total)
        values = self.weighted(rollout)
        # A group is dead here when the sum is constant in it, not when the total reward is.
        live = live_rows(values.where(scored, torch.nan), rollout.group)
        if not bool(live.any()):
            return torch.zeros_like(values)
        batch = values[scored]
        scale = batch_std(batch, ddof=self.ddof) + self.eps
        return ((values - batch.mean()) / scale).where(live, 0.0)
