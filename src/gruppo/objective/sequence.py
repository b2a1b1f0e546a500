"""Policy losses whose ratio belongs to the whole completion: GSPO and its relatives.

Those with ``level = "sequence"`` return one loss per row, [B, 1]; broadcast over the row's tokens
under the weights 1/(B·n) it enters as the mean over rows (``Objective`` refuses other weights).
Masked positions count neither in sums nor in the length n. Reduction, engine correction, KL and
entropy are not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gruppo.objective._check import require
from gruppo.objective.surrogate import (
    Level,
    Live,
    TokenLoss,
    clip_ratio,
    log_ratio,
    nowhere,
)
from gruppo.objective.token import LOG_RATIO_LIMIT


def row_sum(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """Sum over the trained tokens of each row.

    >>> row_sum(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]])).item()
    3.0
    """
    return torch.where(mask, values, 0).sum(dim=1, keepdim=True)


def row_mean(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """Mean over the trained tokens of each row; 0 for a row without any."""
    return row_sum(values, mask) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _require_eps(name: str, eps_low: float, eps_high: float) -> None:
    require(0 < eps_low <= 1, f"{name}.eps_low", eps_low, "must be in (0, 1]")
    require(eps_high > 0, f"{name}.eps_high", eps_high, "must be positive")


def _length_normalised(
    logp: Float[Tensor, "B T"], old_logp: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B 1"]:
    """GSPO's ratio s = exp(mean_t d) of each row."""
    return row_mean(log_ratio(logp, old_logp), mask).exp()


def _clipped(ratio: Tensor, advantage: Tensor, eps_low: float, eps_high: float) -> TokenLoss:
    """The clipped surrogate of rows [B, 1] or tokens [B, T]."""
    factor, low, high = clip_ratio(ratio, advantage, eps_low, eps_high)
    return TokenLoss(loss=-(factor * advantage), clipped_low=low, clipped_high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gspo:
    """GSPO: -min(sA, clip(s)A) with the length-normalised ratio s = exp(mean_t d), per row.

    ``eps_low`` and ``eps_high`` are two orders below PPO's, because s is a geometric mean; about
    15 % clipped rows are normal. A row whose advantage varies enters with its mean.

    Source: Zheng et al., 2507.18071, eq. 5-7.
    """

    kind: Literal["gspo"] = "gspo"
    eps_low: float = 3e-4
    eps_high: float = 4e-4
    level: ClassVar[Level] = "sequence"
    uses_clip: ClassVar[bool] = True
    bypass: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require_eps("Gspo", self.eps_low, self.eps_high)

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Clipped loss [B, 1] of the rows."""
        row = row_mean(advantage, live.mask)
        ratio = _length_normalised(live.logp, old_logp, live.mask)
        return _clipped(ratio, row, self.eps_low, self.eps_high)


@dataclass(frozen=True, slots=True, kw_only=True)
class GspoToken:
    """GSPO-token: the ratio sg[s]·exp(logp - sg[logp]) per token, clipped as GSPO's s.

    Equal to GSPO in value and gradient where a row's advantage is constant, and defined for
    advantages per token (turns, steps). ``eps_low`` and ``eps_high`` as in ``Gspo``.

    Source: Zheng et al., 2507.18071, eq. 13-14.
    """

    kind: Literal["gspo_token"] = "gspo_token"
    eps_low: float = 3e-4
    eps_high: float = 4e-4
    level: ClassVar[Level] = "token"
    uses_clip: ClassVar[bool] = True
    bypass: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require_eps("GspoToken", self.eps_low, self.eps_high)

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Clipped loss [B, T]."""
        level = _length_normalised(live.logp.detach(), old_logp, live.mask)
        ratio = level * (live.logp - live.logp.detach()).exp()
        return _clipped(ratio, advantage, self.eps_low, self.eps_high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gmpo:
    """GMPO: -A·exp(mean_t z), z the log-ratio clipped per token before the geometric mean.

    z = min(d, eps_high) if A > 0 else max(d, -eps_low); the bounds are in log space.

    Source: Zhao et al., 2507.20673.
    """

    kind: Literal["gmpo"] = "gmpo"
    eps_low: float = 0.4
    eps_high: float = 0.4
    level: ClassVar[Level] = "sequence"
    uses_clip: ClassVar[bool] = True
    bypass: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(self.eps_low > 0, "Gmpo.eps_low", self.eps_low, "must be positive (log space)")
        require(self.eps_high > 0, "Gmpo.eps_high", self.eps_high, "must be positive (log space)")

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Loss [B, 1]; the flags [B, T] are the tokens whose log-ratio is at its bound."""
        row = row_mean(advantage, live.mask)
        d = log_ratio(live.logp, old_logp)
        low = (row < 0) & (d < -self.eps_low)
        high = (row > 0) & (d > self.eps_high)
        z = torch.where(low, -self.eps_low, torch.where(high, self.eps_high, d))
        loss = -(row * row_mean(z, live.mask).exp())
        return TokenLoss(loss=loss, clipped_low=low, clipped_high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Luspo:
    """LUSPO: GSPO's row term times the row's length n, mean over rows.

    Removes GSPO's preference for short rows; ``eps_low`` and ``eps_high`` bound s as there. Source:
    2602.05261.
    """

    kind: Literal["luspo"] = "luspo"
    eps_low: float = 2e-3
    eps_high: float = 2.5e-3
    level: ClassVar[Level] = "sequence"
    uses_clip: ClassVar[bool] = True
    bypass: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require_eps("Luspo", self.eps_low, self.eps_high)

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Clipped loss [B, 1] times the row's number of trained tokens."""
        row = row_mean(advantage, live.mask)
        ratio = _length_normalised(live.logp, old_logp, live.mask)
        gspo = _clipped(ratio, row, self.eps_low, self.eps_high)
        return replace(gspo, loss=gspo.loss * live.mask.sum(dim=1, keepdim=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class RlooSeq:
    """Clipped surrogate on the ratio of whole completions, R = exp(clamp(Σ_t d, ±20)), per row.

    The completion is one action (Ahmadian et al., 2402.14740); the form with clipping is TRL's RLOO
    trainer, to [1 - ``eps_low``, 1 + ``eps_high``]. R varies exponentially with the length: meant
    for few, small inner updates.
    """

    kind: Literal["rloo_seq"] = "rloo_seq"
    eps_low: float = 0.2
    eps_high: float = 0.2
    level: ClassVar[Level] = "sequence"
    uses_clip: ClassVar[bool] = True
    bypass: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require_eps("RlooSeq", self.eps_low, self.eps_high)

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Clipped loss [B, 1] of the rows."""
        row = row_mean(advantage, live.mask)
        total = row_sum(log_ratio(live.logp, old_logp), live.mask)
        ratio = total.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        return _clipped(ratio, row, self.eps_low, self.eps_high)


LOG_FLOOR = math.log(1e-8)
"""VESPO's lower bound on a row's log-ratio, as in TRL: below it the weight is 0 anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vespo:
    """VESPO: -φ·A·logp with φ = exp(λ + k·lnW - λW), detached, W the ratio of the completion.

    lnW = clip(Σ_t d, ln 1e-8, 20); (k, λ) = (k_pos, lambda_pos) where A ≥ 0, else (k_neg,
    lambda_neg). φ is 1 at W = 1 and fades on both sides. With an external engine set ``bypass``:
    W then runs from the engine's policy to the live one, which is the correction; a separate
    one would count it twice and is refused.

    Source: 2602.10693.
    """

    kind: Literal["vespo"] = "vespo"
    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0
    bypass: bool = False
    level: ClassVar[Level] = "token"
    uses_clip: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        fields = (
            ("k_pos", self.k_pos),
            ("lambda_pos", self.lambda_pos),
            ("k_neg", self.k_neg),
            ("lambda_neg", self.lambda_neg),
        )
        for name, value in fields:
            require(value >= 0, f"Vespo.{name}", value, "must not be negative")

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Weighted score-function loss [B, T]; nothing is clipped."""
        total = row_sum(log_ratio(live.logp.detach(), old_logp), live.mask)
        log_w = total.clamp(LOG_FLOOR, LOG_RATIO_LIMIT)
        k = torch.where(advantage >= 0, self.k_pos, self.k_neg).to(log_w.dtype)
        rate = torch.where(advantage >= 0, self.lambda_pos, self.lambda_neg).to(log_w.dtype)
        phi = (rate + k * log_w - rate * log_w.exp()).exp()
        flags = nowhere(advantage)
        return TokenLoss(loss=-(phi * advantage * live.logp), clipped_low=flags, clipped_high=flags)
