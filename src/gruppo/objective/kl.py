"""KL to the reference model: how its value is estimated, and how its gradient is.

The two are separate questions. A loss term whose value is a fine estimate can have a useless
gradient (k1: zero in expectation) or the gradient of another divergence (k3 as it stands: that
of KL(ref ‖ π)). The records below return a token term with the value one wants to log and the
gradient one wants to follow.

Token-local terms ignore how an early token changes the KL of later ones; that is accepted
practice. ``KLSequenceSquare`` and a KL in the reward (``KLInReward``, ``ReinforcePP``) do not.
Coefficients and their control are elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.objective._check import require
from gruppo.objective.control import AdaptiveKL
from gruppo.objective.surrogate import log_ratio
from gruppo.objective.token import LOG_RATIO_LIMIT

K3_LIMIT = 10.0
"""k3's value is reported up to 10 (as in verl, NeMo-RL). The gradient is not cut there: k3 > 10
means ref/π > 13.6, just where the pull back is needed most."""


def k1(logp: Float[Tensor, "*shape"], ref_logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Δ = logp - ref_logp: unbiased for KL(π ‖ ref), can be negative, highest variance.

    For the reward and for metrics. In a loss its expected gradient is exactly 0. (Schulman,
    "Approximating KL divergence", 2020, as are k2 and k3.)
    """
    return logp - ref_logp


def k2(logp: Float[Tensor, "*shape"], ref_logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Δ²/2, Δ clamped to ±20: biased in second order, its gradient in a loss is KL(π ‖ ref)'s."""
    delta = (logp - ref_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return delta.square() / 2


def k3(logp: Float[Tensor, "*shape"], ref_logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """e^{-Δ} - 1 + Δ, Δ clamped to ±20 and the value to 10: unbiased and never negative.

    The clamp at 10 does not touch the gradient.

    >>> k3(torch.tensor([0.5]).log(), torch.tensor([0.4]).log())
    tensor([0.0231])
    """
    delta = (logp - ref_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    # expm1 keeps the value right (and not negative) where Δ is tiny.
    estimate = torch.expm1(-delta) + delta
    return _with_gradient(estimate.clamp(max=K3_LIMIT), estimate)


def _with_gradient(
    value: Float[Tensor, "*shape"], carrier: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """``value``, exactly, with the gradient of ``carrier``."""
    return value.detach() + (carrier - carrier.detach())


@runtime_checkable
class KLEstimator(Protocol):
    """A KL term per token."""

    def __call__(
        self,
        logp: Float[Tensor, "B T"],
        old_logp: Float[Tensor, "B T"],
        ref_logp: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """Token terms; inputs are 0 where the mask is False."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KLNaive:
    """k3, differentiated as it stands: the gradient of KL(ref ‖ π) on-policy.

    As printed in DeepSeekMath, 2402.03300, eq. 4. Its gradient 1 - e^{-Δ} explodes where the
    reference likes a token much better than the policy.
    """

    kind: Literal["naive"] = "naive"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(
        self,
        logp: Float[Tensor, "B T"],
        old_logp: Float[Tensor, "B T"],
        ref_logp: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """k3 with its own gradient."""
        return k3(logp, ref_logp)


@dataclass(frozen=True, slots=True, kw_only=True)
class KLUnbiased:
    """ρ·k3 with the live ratio ρ = exp(logp - old_logp): KL(π ‖ ref), off-policy too.

    Written as sg[ρ·k3] + sg[ρ]·(k2 - sg[k2]), which has the same value and the same gradient
    ρ·Δ but keeps e^{-Δ} out of the backward pass. Source: DeepSeek-V3.2, 2512.02556, eq. 7.

    Example:
        >>> logp = torch.tensor([[-1.0]], requires_grad=True)
        >>> term = KLUnbiased()(logp, torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))
        >>> term.sum().backward()
        >>> round(term.item(), 4), logp.grad.item()
        (0.1065, 0.5)
    """

    kind: Literal["unbiased_is"] = "unbiased_is"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(
        self,
        logp: Float[Tensor, "B T"],
        old_logp: Float[Tensor, "B T"],
        ref_logp: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """ρ·k3 with gradient ρ·Δ."""
        ratio = log_ratio(logp.detach(), old_logp).exp()
        return _with_gradient(ratio * k3(logp.detach(), ref_logp), ratio * k2(logp, ref_logp))


@dataclass(frozen=True, slots=True, kw_only=True)
class KLStraightThrough:
    """The value of k3 with the gradient of k2, sg[k3] + k2 - sg[k2]: KL(π ‖ ref) on-policy.

    Source: verl's "k3+".
    """

    kind: Literal["unbiased_st"] = "unbiased_st"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(
        self,
        logp: Float[Tensor, "B T"],
        old_logp: Float[Tensor, "B T"],
        ref_logp: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """k3 with gradient Δ."""
        return _with_gradient(k3(logp.detach(), ref_logp), k2(logp, ref_logp))


@dataclass(frozen=True, slots=True, kw_only=True)
class KLSquare:
    """k2 = Δ²/2, value and gradient: that of KL(π ‖ ref) on-policy.

    Source: REINFORCE++-baseline, 2501.03262.
    """

    kind: Literal["k2"] = "k2"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(
        self,
        logp: Float[Tensor, "B T"],
        old_logp: Float[Tensor, "B T"],
        ref_logp: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """k2 with gradient Δ."""
        return k2(logp, ref_logp)


@dataclass(frozen=True, slots=True, kw_only=True)
class KLSequenceSquare:
    """½(Σ_t Δ)² of the completion, spread over its tokens as ½·Δ_t·Σ_u Δ_u.

    Its expected gradient is that of the KL between distributions over whole completions: early
    tokens also answer for the KL of what follows. The variance grows with the length; for short
    completions.
    """

    kind: Literal["k2_sequence"] = "k2_sequence"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(
        self,
        logp: Float[Tensor, "B T"],
        old_logp: Float[Tensor, "B T"],
        ref_logp: Float[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """Token shares of ½(Σ_t Δ)²; token t has gradient Σ_u Δ_u."""
        delta = log_ratio(logp, ref_logp)
        total = delta.detach().sum(dim=1, keepdim=True)
        return _with_gradient(delta * total / 2, delta * total)


PlainKL = KLNaive | KLUnbiased | KLStraightThrough | KLSquare | KLSequenceSquare


@dataclass(frozen=True, slots=True, kw_only=True)
class KLTerm:
    """β times a KL term in the loss. ``beta = 0`` is off: no reference model is asked for.

    With ``adaptive`` ``beta`` is only the start value. Published: .04 (DeepSeekMath), .001 (R1),
    0 (DAPO and most later work).
    """

    beta: float
    estimator: PlainKL | KLEstimator = field(default_factory=KLUnbiased)
    adaptive: AdaptiveKL | None = None
    __pydantic_config__: ClassVar = {"extra": "forbid", "arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        require(self.beta >= 0, "KLTerm.beta", self.beta, "must not be negative; 0 is off")
        require(
            self.adaptive is None or self.beta > 0,
            "KLTerm.beta",
            self.beta,
            "must be positive with adaptive control, which only scales it",
        )
        require(
            self.estimator is not k1,
            "KLTerm.estimator",
            "k1",
            "has expected gradient 0 inside a loss; use KLUnbiased(), or k1 in the reward "
            "through KLInReward",
        )

    @property
    def active(self) -> bool:
        """Does the term contribute."""
        return self.beta > 0


def full_kl(
    logits: Float[Tensor, "*rows V"], ref_logits: Float[Tensor, "*rows V"]
) -> Float[Tensor, "*rows"]:
    """Exact KL(π ‖ ref) per position over the vocabulary, differentiable in both; float32 at least.

    >>> p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    >>> full_kl(p.log(), q.log())
    tensor(0.0253)
    """
    logp = _wide(logits).log_softmax(dim=-1)
    ref = _wide(ref_logits).log_softmax(dim=-1)
    return (logp.exp() * (logp - ref)).sum(dim=-1)


def _wide(logits: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
