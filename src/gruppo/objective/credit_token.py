"""Credit estimators that give every token its own advantage: process rewards and REINFORCE++.

They return [B, T], float64, 0 on positions that are not trained. The formulas that need no
rollout (returns, GAE, whitening) are in token.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.objective.credit_base import (
    check_ddof,
    check_not_negative,
    dead_groups,
    deviations,
    group_count,
    group_std,
    live_rows,
    require,
)
from gruppo.objective.token import returns_to_go, token_rewards, whiten
from gruppo.types import Evidence, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Process supervision: step rewards, normalised over all steps of the group, summed forward.

    r̃ = (r − mean)/(σ + eps) over every step of every scored row of the group, and a token gets the
    sum of r̃ over its own step and all later ones (``end > t``). Groups with fewer than two scored
    rows, or equal step rewards, get 0. ``ddof`` = 1 divides σ² by n − 1. Source: DeepSeekMath,
    arXiv 2402.03300, §4.1.3.
    """

    kind: Literal["process"] = "process"
    ddof: int = 1
    eps: float = 1e-4

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = frozenset()
    min_group: ClassVar[int] = 2
    centred: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ddof(self.ddof)
        check_not_negative("eps", self.eps)

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B T"]:
        """Advantages [B, T]."""
        scored = torch.isfinite(rollout.total)
        mask = rollout.mask.cpu()
        flat = [
            (row, end, value)
            for row, steps in enumerate(rollout.steps)
            for end, value in steps
            if end > 0 and math.isfinite(value) and bool(scored[row])
        ]
        credit = torch.zeros(mask.shape, dtype=torch.float64)
        if not flat or mask.shape[1] == 0:
            return credit
        row = torch.tensor([step[0] for step in flat])
        end = torch.tensor([step[1] for step in flat])
        value = torch.tensor([step[2] for step in flat], dtype=torch.float64)
        group = rollout.group[row]
        small = group_count(scored, rollout.group) < 2  # [P]
        live = live_rows(value, group) & ~small[group]
        deviation = deviations(value, group, live)
        std = group_std(deviation, group, keep=live, ddof=self.ddof)[group]
        normal = (deviation / (std + self.eps)).where(live, 0.0)
        # Put each step on its last token; the reversed running sum then credits all earlier ones.
        credit.index_put_((row, end.clamp(max=mask.shape[1]) - 1), normal, accumulate=True)
        return credit.flip(1).cumsum(1).flip(1).where(mask, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinforcePP:
    """REINFORCE++: token returns with the KL penalty inside, whitened over the whole batch.

    Token reward −β·k1, plus the row reward (clipped to ±10) on the last trained token; returns with
    discount γ; whitened over all trained tokens of scored rows. There is no group baseline, so one
    completion per prompt is enough. ``beta`` is β, ``gamma`` is γ, and ``ddof`` = 0 whitens with
    the population's variance. Source: arXiv 2501.03262.
    """

    kind: Literal["reinforce_pp"] = "reinforce_pp"
    beta: float = 0.0
    gamma: float = 1.0
    ddof: int = 0

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    min_group: ClassVar[int] = 1
    centred: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ddof(self.ddof)
        check_not_negative("beta", self.beta)
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"gamma = {self.gamma} must be in (0, 1]; 1 discounts nothing")

    @property
    def needs(self) -> frozenset[str]:
        """The KL penalty reads both policies; without it nothing is needed."""
        return frozenset({"old_logp", "ref_logp"}) if self.beta > 0.0 else frozenset()

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B T"]:
        """Advantages [B, T]; ValueError if beta > 0 and a log-probability is missing."""
        trained = rollout.mask.cpu() & torch.isfinite(rollout.total)[:, None]
        k1 = torch.zeros(trained.shape, dtype=torch.float64)
        if self.beta > 0.0:
            old = require(evidence.old_logp, "evidence.old_logp", "credit reinforce_pp")
            k1 = old - require(evidence.ref_logp, "evidence.ref_logp", "credit reinforce_pp")
        rewards = token_rewards(rollout.total.double(), k1, trained, beta=self.beta)
        return whiten(returns_to_go(rewards, trained, gamma=self.gamma), trained, ddof=self.ddof)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinforcePPBaseline:
    """REINFORCE++-baseline: reward minus group mean, whitened over all trained tokens.

    Dead groups are part of the whitening statistics, as in OpenRLHF, but get exactly 0 themselves
    (there the shift by the token mean leaks into them). Source: arXiv 2501.03262, which pairs it
    with a k2 KL loss. ``ddof`` as in ``ReinforcePP``.
    """

    kind: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"
    ddof: int = 0

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = frozenset()
    min_group: ClassVar[int] = 2
    centred: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ddof(self.ddof)

    def __call__(self, rollout: Rollout, evidence: Evidence) -> Float[Tensor, "B T"]:
        """Advantages [B, T]."""
        total, group = rollout.total.double(), rollout.group
        trained = rollout.mask.cpu() & torch.isfinite(total)[:, None]
        deviation = deviations(total, group, live_rows(total, group))
        white = whiten(deviation[:, None].expand(trained.shape), trained, ddof=self.ddof)
        return white.where(~dead_groups(total, group)[group][:, None], 0.0)
