"""Credit for pass@k: the best of k completions counts, not the average one.

Two estimators: only the best row of a group is credited (any rewards), or the expected pass@k
advantage over all subsets of k rows (binary rewards). The pass@k *metric* is in estimate.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.objective.credit_base import (
    check_not_negative,
    deviations,
    group_count,
    group_std,
    live_rows,
    num_groups,
)
from gruppo.types import Evidence, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class PasskBest:
    """Only the best row of a group is credited, by its lead over the second best.

    A = (R₁ − R₂) / (σ + eps) on the best row, 0 on all others; a tie at the top gives 0 to all.
    ``std = False`` leaves the division away. σ has divisor n − 1. Source: arXiv 2503.19595.
    """

    kind: Literal["passk_best"] = "passk_best"
    std: bool = True
    eps: float = 1e-4

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = frozenset()
    min_group: ClassVar[int] = 2
    centred: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_not_negative("eps", self.eps)

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B"]:
        """Advantages [B]."""
        total, group = rollout.total.double(), rollout.group
        live = live_rows(total, group)
        low = torch.full((num_groups(group),), -torch.inf, dtype=torch.float64)
        best = low.scatter_reduce(0, group, total.where(live, -torch.inf), "amax")
        top = live & (total == best[group])
        rest = total.where(live & ~top, -torch.inf)
        second = low.scatter_reduce(0, group, rest, "amax")
        lead = (best - second).where(group_count(top, group) == 1, 0.0)
        if self.std:
            deviation = deviations(total, group, live)
            lead = lead / (group_std(deviation, group, keep=live, ddof=1) + self.eps)
        return lead[group].where(top, 0.0)


def _choose_ratio(part: Int[Tensor, "P"], whole: Int[Tensor, "P"], k: int) -> Float[Tensor, "P"]:
    """C(part, k) / C(whole, k) as a product, exact where binomials would overflow; 0 if part < k.

    Groups with whole < k have no subsets; they get 0.
    """
    ratio = (whole >= k).double()
    for j in range(k):
        ratio = ratio * (part - j).clamp(min=0) / (whole - j).clamp(min=1)
    return ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class PasskAnalytic:
    """Expected normalised pass@k advantage over all subsets of k rows, in closed form.

    With N rows, N⁻ wrong ones, F = C(N⁻, k)/C(N, k) and σ = √(F(1 − F)): a right row gets
    A⁺ = F/σ, a wrong one A⁻ = (F − C(N⁻−1, k−1)/C(N−1, k−1))/σ; σ = 0 gives 0. k = 1 is ``Grpo``
    with population σ. Rewards must be 0 or 1 (or −1 and 1): a recipe whose settings make others of
    them is refused, a reward function that gives others all the same stops the run there. Groups
    with fewer than k scored rows get 0. Source: arXiv 2508.10751.

    Example:
        >>> from gruppo.objective.credit import outcome
        >>> PasskAnalytic(k=2)(outcome([1.0, 0.0, 0.0], [0, 0, 0]), Evidence())
        tensor([ 0.7071, -0.3536, -0.3536], dtype=torch.float64)
    """

    kind: Literal["passk_analytic"] = "passk_analytic"
    k: int

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = frozenset()
    centred: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k = {self.k} must be at least 1 (and at most the group size)")

    @property
    def min_group(self) -> int:
        """A group needs k rows to have a subset of k, and two to compare."""
        return max(2, self.k)

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B"]:
        """Advantages [B]; ValueError if a scored reward is not binary."""
        total, group = rollout.total.double(), rollout.group
        live, right = live_rows(total, group), total > 0.5
        binary = ~torch.isfinite(total) | (total.abs() == 1.0) | (total == 0.0)
        if not bool(binary.all()):
            raise ValueError(
                f"credit passk_analytic needs rewards of 0 and 1, but got "
                f"{float(total[~binary][0])}: leave shaping away, or use passk_best"
            )
        rows, wrong = group_count(live, group), group_count(live & ~right, group)
        fail = _choose_ratio(wrong, rows, self.k)
        fail_with = _choose_ratio(wrong - 1, rows - 1, self.k - 1)
        std = (fail * (1.0 - fail)).sqrt()
        credit = torch.where(right, fail[group], (fail - fail_with)[group]) / std[group]
        return credit.where(live & (std > 0.0)[group], 0.0)
