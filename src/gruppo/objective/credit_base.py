"""Group statistics that all credit estimators share, and the ``Credit`` protocol.

Everything is vectorised over rows by their group ids, so groups may differ in size and rows may
come in any order. Group ids are 0 … P−1. This module does not know any estimator, and it never
infers a group from row order.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gruppo.types import ZERO_TOL, Evidence, Rollout


@runtime_checkable
class Credit(Protocol):
    """Turns the rewards of a rollout into advantages, once per rollout batch.

    Returns [B] (one advantage for every token of the row) or [B, T], float64 on the host, with 0
    on unscored rows. ``needs`` names the evidence that it reads ("old_logp", "ref_logp", "greedy":
    there is no other); ``min_group`` is the smallest group it can say anything about; ``centred``
    tells that the advantages of the scored rows sum to 0 in each group.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Evidence that must be there when the estimator is called."""
        ...

    @property
    def min_group(self) -> int:
        """Smallest group size that can give a non-zero advantage."""
        ...

    @property
    def centred(self) -> bool:
        """True if the advantages of scored rows sum to 0 in every group."""
        ...

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Tensor:
        """Advantages [B] or [B, T] of the rollout."""
        ...


def num_groups(group: Int[Tensor, "B"]) -> int:
    """Number of groups P, with ids 0 … P−1."""
    return int(group.max()) + 1 if group.numel() else 0


def group_sum(values: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> Float[Tensor, "P"]:
    """Sum of the rows of every group.

    >>> group_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1]))
    tensor([2., 5.])
    """
    return values.new_zeros(num_groups(group)).index_add(0, group, values)


def group_count(keep: Bool[Tensor, "B"], group: Int[Tensor, "B"]) -> Int[Tensor, "P"]:
    """Number of kept rows in every group."""
    counts = torch.zeros(num_groups(group), dtype=torch.int64, device=group.device)
    return counts.index_add(0, group, keep.long())


def dead_groups(
    total: Float[Tensor, "B"], group: Int[Tensor, "B"], *, zero_tol: float = ZERO_TOL
) -> Bool[Tensor, "P"]:
    """Groups that can teach nothing: fewer than two scored rows, or all rewards equal.

    Args:
        total: Rewards; NaN (and ±inf) means unscored.
        group: Group id of every row.
        zero_tol: Rewards are equal if maximum − minimum is not above this.

    Returns:
        True for every dead group (also for an id without rows).

    Example:
        >>> rewards = torch.tensor([1.0, 0.0, 0.1, 0.1, 1.0, float("nan")])
        >>> dead_groups(rewards, torch.tensor([0, 0, 1, 1, 2, 2]))
        tensor([False,  True,  True])
    """
    scored = torch.isfinite(total)
    edge = torch.full((num_groups(group),), math.inf, dtype=total.dtype, device=total.device)
    low = edge.scatter_reduce(0, group, total.where(scored, math.inf), "amin")
    high = (-edge).scatter_reduce(0, group, total.where(scored, -math.inf), "amax")
    return (group_count(scored, group) < 2) | ~(high - low > zero_tol)


def live_rows(
    total: Float[Tensor, "B"], group: Int[Tensor, "B"], *, zero_tol: float = ZERO_TOL
) -> Bool[Tensor, "B"]:
    """Scored rows of groups that are not dead."""
    return torch.isfinite(total) & ~dead_groups(total, group, zero_tol=zero_tol)[group]


def group_mean(
    values: Float[Tensor, "B"], group: Int[Tensor, "B"], keep: Bool[Tensor, "B"]
) -> Float[Tensor, "P"]:
    """Mean over the kept rows of every group; 0 for a group without any."""
    count = group_count(keep, group).clamp(min=1)
    return group_sum(values.where(keep, 0.0), group) / count


def deviations(
    values: Float[Tensor, "B"], group: Int[Tensor, "B"], keep: Bool[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Kept rows minus the mean of the kept rows of their group; 0 on the others.

    The mean is taken twice: the second pass removes the rounding error of the first, so that the
    deviations sum to 0 also for rewards with a large common offset.
    """
    first = values - group_mean(values, group, keep)[group]
    second = first - group_mean(first, group, keep)[group]
    return second.where(keep, 0.0)


def group_std(
    deviation: Float[Tensor, "B"],
    group: Int[Tensor, "B"],
    *,
    keep: Bool[Tensor, "B"],
    ddof: int,
) -> Float[Tensor, "P"]:
    """Standard deviation of every group from its deviations (divisor n − ddof; 0 if that is 0)."""
    freedom = group_count(keep, group) - ddof
    variance = group_sum(deviation.where(keep, 0.0).square(), group) / freedom.clamp(min=1)
    return variance.where(freedom > 0, 0.0).sqrt()


def batch_std(values: Float[Tensor, "N"], *, ddof: int) -> float:
    """Standard deviation of a flat batch (divisor n − ddof; 0 if that is not positive).

    >>> batch_std(torch.tensor([1.0, 3.0], dtype=torch.float64), ddof=0)
    1.0
    """
    freedom = values.numel() - ddof
    if freedom <= 0:
        return 0.0
    return math.sqrt(float((values - values.mean()).square().sum()) / freedom)


def combine_parts(parts: Float[Tensor, "B K"], weights: Float[Tensor, "K"]) -> Float[Tensor, "B"]:
    """Σ_k w_k r^k over the parts that did not abstain (NaN); NaN for a row without any part.

    >>> nan = float("nan")
    >>> combine_parts(torch.tensor([[1.0, 0.5], [nan, 0.5], [nan, nan]]), torch.tensor([1.0, 0.5]))
    tensor([1.2500, 0.2500,    nan])
    """
    given = torch.isfinite(parts)
    total = (parts.where(given, 0.0) * weights).sum(1)
    return total.where(given.any(1), torch.nan)


def check_ddof(ddof: int) -> None:
    """Refuse a divisor offset other than 0 (population) and 1 (Bessel)."""
    if ddof not in (0, 1):
        raise ValueError(f"ddof = {ddof} is not a divisor offset: use 1 (n − 1) or 0 (n)")


def check_not_negative(name: str, value: float) -> None:
    """Refuse a negative or non-finite setting."""
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"{name} = {value} must be a finite number ≥ 0")


def require(tensor: Tensor | None, name: str, who: str) -> Tensor:
    """The tensor as float64 on the host; ValueError if the pass that makes it was not run."""
    if tensor is None:
        raise ValueError(f"{who} needs {name}, but it is None: run the pass that computes it")
    return tensor.detach().double().cpu()
