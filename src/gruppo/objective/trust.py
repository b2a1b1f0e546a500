"""Token losses that hold the policy near the old one by other means than a clipped ratio.

DPPO masks by the change of probability, KL-Cov and DRO add a penalty on the log-ratio. The
penalties act on tokens of advantage 0 too. Choosing the tokens that KL-Cov penalises is in
``keep.py``; the KL to the reference model is in ``kl.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gruppo.objective._check import require
from gruppo.objective.surrogate import Level, Live, TokenLoss, log_ratio, nowhere


def _beyond(
    live: Live,
    old_logp: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    deltas: tuple[float, float],
) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Where the probability has already moved by more than (delta_low, delta_high) as A asks."""
    change = live.logp.detach().exp() - old_logp.exp()
    return (advantage < 0) & (change < -deltas[0]), (advantage > 0) & (change > deltas[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class DppoTv:
    """DPPO with the total-variation mask: -keep·ρ·A, gradient through ρ.

    A token is dropped when its probability has already moved too far in the direction the
    advantage asks for: π - π_old > delta_high for A > 0, < -delta_low for A < 0. Unlike a ratio
    bound this leaves rare tokens free. ``w_max`` caps the ratio's value as a detached factor
    (verl: 20); None leaves it alone. ``bypass`` takes π_old from the engine.

    Source: 2602.04879.
    """

    kind: Literal["dppo_tv"] = "dppo_tv"
    delta_low: float = 0.2
    delta_high: float = 0.2
    w_max: float | None = None
    bypass: bool = False
    level: ClassVar[Level] = "token"
    uses_clip: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name, value in (("delta_low", self.delta_low), ("delta_high", self.delta_high)):
            require(
                0 < value <= 1, f"DppoTv.{name}", value, "is a probability; choose one in (0, 1]"
            )
        require(
            self.w_max is None or self.w_max >= 1,
            "DppoTv.w_max",
            self.w_max,
            "caps the ratio, so it must be at least 1, or unset",
        )

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Loss [B, T]; the flags are the dropped tokens."""
        low, high = _beyond(live, old_logp, advantage, (self.delta_low, self.delta_high))
        ratio = log_ratio(live.logp, old_logp).exp()
        if self.w_max is not None:
            value = ratio.detach()
            ratio = ratio * (value.clamp(max=self.w_max) / value)
        loss = torch.where(low | high, 0, -(ratio * advantage))
        return TokenLoss(loss=loss, clipped_low=low, clipped_high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class DppoKl:
    """prime-rl's default loss: the DPPO mask against the engine, plus τ·(logp - engine_logp)².

    The ratio and the mask are taken against the engine's log-probabilities (``bypass`` is always
    on), so mismatch and drift are one; the square keeps the two policies together, on dropped
    tokens too. ``delta_low`` and ``delta_high`` as in ``DppoTv``; ``kl_tau`` is τ.

    Sources: 2602.04879 for the mask; prime-rl for the combination.
    """

    kind: Literal["dppo_kl"] = "dppo_kl"
    delta_low: float = 0.2
    delta_high: float = 0.2
    kl_tau: float = 1e-3
    level: ClassVar[Level] = "token"
    uses_clip: ClassVar[bool] = False
    bypass: ClassVar[bool] = True
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name, value in (("delta_low", self.delta_low), ("delta_high", self.delta_high)):
            require(
                0 < value <= 1, f"DppoKl.{name}", value, "is a probability; choose one in (0, 1]"
            )
        require(self.kl_tau >= 0, "DppoKl.kl_tau", self.kl_tau, "must not be negative")

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Loss [B, T]; the flags are the tokens whose policy term is dropped."""
        low, high = _beyond(live, engine_logp, advantage, (self.delta_low, self.delta_high))
        d = log_ratio(live.logp, engine_logp)
        loss = torch.where(low | high, 0, -(d.exp() * advantage)) + self.kl_tau * d.square()
        return TokenLoss(loss=loss, clipped_low=low, clipped_high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class KlCov:
    """KL-Cov's loss: -ρA on every token, plus kappa·|d| on the selected ones.

    The tokens are those of highest covariance between advantage and log-probability, chosen
    once per optimizer step by ``KlCovTokens``.

    Source: Cui et al., 2505.22617 (kappa = 1; verl's default is .1).
    """

    kind: Literal["kl_cov"] = "kl_cov"
    kappa: float = 1.0
    level: ClassVar[Level] = "token"
    uses_clip: ClassVar[bool] = False
    bypass: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(self.kappa > 0, "KlCov.kappa", self.kappa, "must be positive")

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Penalised loss [B, T]; nothing is clipped."""
        assert selected is not None, "Objective pairs this loss with KlCovTokens"
        d = log_ratio(live.logp, old_logp)
        loss = -(d.exp() * advantage) + torch.where(selected, self.kappa * d.abs(), 0)
        flags = nowhere(d)
        return TokenLoss(loss=loss, clipped_low=flags, clipped_high=flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dro:
    """DRO: -(A·logp - ½b·d²), the score function with a quadratic pull to the old policy.

    ``b`` has no published default and must be given. Source: Richemond et al., 2405.19107; the
    form without a learned value is verl's.
    """

    kind: Literal["dro"] = "dro"
    b: float
    level: ClassVar[Level] = "token"
    uses_clip: ClassVar[bool] = False
    bypass: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(self.b > 0, "Dro.b", self.b, "must be positive")

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Loss [B, T]; nothing is clipped."""
        d = log_ratio(live.logp, old_logp)
        loss = 0.5 * self.b * d.square() - advantage * live.logp
        flags = nowhere(d)
        return TokenLoss(loss=loss, clipped_low=flags, clipped_high=flags)
