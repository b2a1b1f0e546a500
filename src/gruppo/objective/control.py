"""Controllers of coefficients: adaptive KL, adaptive entropy bonus, and the reference mix-up.

A controller is pure: after every optimizer step it takes its state and what was measured, and
returns the new state and the coefficient for the *next* step. Whoever runs the loop holds the
state, and the checkpoint saves it. Learning-rate schedules are not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from gruppo.objective.credit_base import check_not_negative


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveKL:
    """Proportional controller that holds the KL to the reference near a target.

    β ← β (1 + clip(KL/target − 1, ±limit) · rows/horizon). Source: Ziegler et al., arXiv
    1909.08593 (limit 0.2, horizon 10,000 rows).

    Example:
        >>> round(AdaptiveKL(target=6.0)(0.2, 7.0, 256)[1], 6)
        0.200853
    """

    kind: Literal["adaptive_kl"] = "adaptive_kl"
    target: float
    horizon: int = 10_000
    limit: float = 0.2

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.target > 0.0:
            raise ValueError(f"target = {self.target} must be a positive KL in nats, such as 0.1")
        if self.horizon < 1:
            raise ValueError(f"horizon = {self.horizon} must be at least 1 row")
        check_not_negative("limit", self.limit)

    def start(self, coefficient: float) -> tuple[float, float]:
        """State and coefficient of the first step: both are the configured β."""
        return coefficient, coefficient

    def __call__(self, state: float, observed: float, num_rows: int) -> tuple[float, float]:
        """New state and coefficient after a step of ``num_rows`` rows with mean KL ``observed``.

        A KL that is not finite (no trained token) leaves β as it is.
        """
        if not math.isfinite(observed):
            return state, state
        error = min(max(observed / self.target - 1.0, -self.limit), self.limit)
        coefficient = max(state * (1.0 + error * num_rows / self.horizon), 0.0)
        return coefficient, coefficient


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveEntropy:
    """Steps the entropy coefficient up while entropy is at or below its target, down above it.

    After a step with entropy H: α ← clip(α ± delta, min, max), and the next step applies α
    if H ≤ target, else 0. The first step applies 0. Source: Skywork-OR1, arXiv 2505.22312.

    Example:
        >>> AdaptiveEntropy()(0.005, 0.15, 512)
        (0.01, 0.01)
        >>> AdaptiveEntropy(delta=0.5)(0.75, 0.25, 512)
        (0.25, 0.0)
    """

    kind: Literal["adaptive_entropy"] = "adaptive_entropy"
    target: float = 0.2
    delta: float = 0.005
    min: float = 0.0
    max: float = 1.0

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name, value in (("target", self.target), ("delta", self.delta), ("min", self.min)):
            check_not_negative(name, value)
        if not self.max >= self.min:
            raise ValueError(f"max = {self.max} is below min = {self.min}: swap or raise it")

    def start(self, coefficient: float) -> tuple[float, float]:
        """State and coefficient of the first step: α within its range, and nothing applied."""
        return min(max(coefficient, self.min), self.max), 0.0

    def __call__(self, state: float, observed: float, num_rows: int) -> tuple[float, float]:
        """New α, and the coefficient for the next step, after measuring entropy ``observed``.

        An entropy that is not finite (no trained token) leaves α and applies nothing.
        """
        if not math.isfinite(observed):
            return state, 0.0
        low = observed <= self.target
        alpha = min(max(state + (self.delta if low else -self.delta), self.min), self.max)
        return alpha, alpha if low else 0.0


def mix(
    reference: Float[Tensor, "*shape"], policy: Float[Tensor, "*shape"], *, alpha: float
) -> Float[Tensor, "*shape"]:
    """Reference refresh: α·policy + (1 − α)·reference; α = 1 is a hard copy.

    The formula by itself: ``Policy.sync_reference`` applies it in place, parameter by parameter.
    Source: TR-DPO, arXiv 2404.09656, soft update; TRL's ``ref_model_mixup_alpha``.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha = {alpha} must be in [0, 1]; 1 copies the policy")
    return alpha * policy + (1.0 - alpha) * reference
