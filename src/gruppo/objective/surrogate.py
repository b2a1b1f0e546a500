"""Token-level policy losses, and the types that every surrogate shares.

A surrogate turns live log-probabilities and advantages into one loss per token (or per row, see
``sequence.py``). It deliberately does not reduce, weight by the inference engine's mismatch, add
KL or entropy, or make metrics: ``loss.py`` and the layers above do that.

Inputs are clean: ``compute_loss`` sets every tensor to 0 (log-probabilities and advantages alike)
where the mask is False, so a formula needs no selection of its own. ``old_logp`` is the
denominator of the ratio: the trainer's policy before the inner updates, or the engine's
log-probabilities where ``bypass`` is set; ``compute_loss`` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gruppo.objective._check import require
from gruppo.objective.token import LOG_RATIO_LIMIT

Level = Literal["token", "sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What the training forward gave: log-probabilities [B, T] with gradient, in nats.

    ``entropy`` [B, T] with gradient, for the entropy term; ``mask`` is True on trained tokens.

    Example:
        >>> live = Live(logp=torch.zeros(1, 2), entropy=None, mask=torch.tensor([[True, False]]))
        >>> live.mask.sum().item()
        1
    """

    logp: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"] | None
    mask: Bool[Tensor, "B T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """Loss per token [B, T], or per row [B, 1], unreduced.

    ``clipped_low`` / ``clipped_high`` say where a bound took the gradient away (A < 0 below the
    lower, A > 0 above the upper one), or, for methods without clipping, where their own bound
    was reached.
    """

    loss: Float[Tensor, "B #T"]
    clipped_low: Bool[Tensor, "B #T"]
    clipped_high: Bool[Tensor, "B #T"]


@runtime_checkable
class Surrogate(Protocol):
    """A policy loss. Rows must not see each other: no reduction over the batch dimension.

    ``level`` is "token" for a [B, T] loss and "sequence" for a [B, 1] one; ``uses_clip`` says
    whether the ratio is clipped; ``bypass`` makes ``old_logp`` the engine's log-probabilities.
    """

    @property
    def level(self) -> Level:
        """Is there one loss per token or one per row."""
        ...

    @property
    def uses_clip(self) -> bool:
        """Is the ratio clipped."""
        ...

    @property
    def bypass(self) -> bool:
        """Is the ratio taken against the inference engine."""
        ...

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Per-token (or per-row) loss, minimised; ``selected`` tokens are to be penalised."""
        ...


def log_ratio(logp: Float[Tensor, "B T"], old_logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Clamped log-ratio d = clamp(logp - old_logp, ±20), differentiable inside the clamp.

    The clamp (as in verl, OpenRLHF, NeMo-RL) is in the graph: outside the gradient is 0.

    >>> log_ratio(torch.tensor([[-1.0, -50.0]]), torch.tensor([[-1.5, -1.0]])).tolist()
    [[0.5, -20.0]]
    """
    return (logp - old_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clip_ratio(
    ratio: Float[Tensor, "B #T"],
    advantage: Float[Tensor, "B #T"],
    eps_low: float,
    eps_high: float,
) -> tuple[Float[Tensor, "B #T"], Bool[Tensor, "B #T"], Bool[Tensor, "B #T"]]:
    """The factor f with min(ρA, clip(ρ, 1-ε_low, 1+ε_high)A) = fA, and where each bound holds.

    Selecting the bound instead of taking a minimum makes the gradient exactly 0 where clipped
    and exactly ρA elsewhere, ties included. (Schulman et al., 1707.06347, eq. 7; the asymmetric
    bounds: DAPO, 2503.14476, eq. 10.)

    Returns:
        (factor, low, high), all of the ratio's shape.
    """
    low = (advantage < 0) & (ratio < 1 - eps_low)
    high = (advantage > 0) & (ratio > 1 + eps_high)
    factor = torch.where(low, 1 - eps_low, torch.where(high, 1 + eps_high, ratio))
    return factor, low, high


def nowhere(like: Float[Tensor, "B #T"]) -> Bool[Tensor, "B #T"]:
    """All False, in the shape of ``like``: the clip flags of a loss that does not clip."""
    return torch.zeros_like(like, dtype=torch.bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoClip:
    """PPO's clipped surrogate per token: -min(ρA, clip(ρ, 1-ε_low, 1+ε_high)A).

    ρ = exp(logp - old_logp). ``eps_high = None`` means ``eps_low``; the default .28 is DAPO's
    clip-higher, which lets rare tokens grow.

    For A < 0 the plain loss is unbounded in ρ. ``dual_clip = c`` (> 1) bounds it by -cA, with
    gradient 0 for ρ > c (Ye et al., 1912.09729); ``delta`` is the two-sided clip of INTELLECT-2
    (2505.07291), min(ρ, δ) in the unclipped branch with δ > 1 + ε_high. For a scalar advantage
    the two are the same function, so only one may be set.

    ``bypass`` takes the ratio against the engine's log-probabilities (verl's bypass mode).

    Sources: Schulman et al., 1707.06347, eq. 7; DAPO, 2503.14476, eq. 10.

    Example:
        >>> live = Live(logp=torch.tensor([[0.0]]), entropy=None, mask=torch.tensor([[True]]))
        >>> old = torch.tensor([[-0.5]])
        >>> PpoClip()(live, old_logp=old, engine_logp=old, advantage=torch.tensor([[1.0]]),
        ...           selected=None).loss
        tensor([[-1.2800]])
    """

    kind: Literal["ppo_clip"] = "ppo_clip"
    eps_low: float = 0.2
    eps_high: float | None = 0.28
    dual_clip: float | None = None
    delta: float | None = None
    bypass: bool = False
    level: ClassVar[Level] = "token"
    uses_clip: ClassVar[bool] = True
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(0 < self.eps_low <= 1, "PpoClip.eps_low", self.eps_low, "must be in (0, 1]")
        require(self.upper > 0, "PpoClip.eps_high", self.eps_high, "must be positive, or unset")
        require(
            self.dual_clip is None or self.dual_clip > 1,
            "PpoClip.dual_clip",
            self.dual_clip,
            "must exceed 1, else it would cap on-policy tokens; 3.0 is usual",
        )
        require(
            self.delta is None or self.delta > 1 + self.upper,
            "PpoClip.delta",
            self.delta,
            f"must exceed 1 + eps_high = {1 + self.upper:g}; 4.0 is usual",
        )
        require(
            self.dual_clip is None or self.delta is None,
            "PpoClip.delta",
            self.delta,
            "is the same bound as dual_clip, which is set too; keep one of them",
        )

    @property
    def upper(self) -> float:
        """The upper clip distance in force: ``eps_high``, or ``eps_low`` where that is None."""
        return self.eps_low if self.eps_high is None else self.eps_high

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Clipped loss [B, T]; the flags are the low- and high-clipped tokens."""
        ratio = log_ratio(live.logp, old_logp).exp()
        factor, low, high = clip_ratio(ratio, advantage, self.eps_low, self.upper)
        cap = self.delta if self.dual_clip is None else self.dual_clip
        if cap is not None:
            factor = torch.where((advantage < 0) & (ratio > cap), cap, factor)
        return TokenLoss(loss=-(factor * advantage), clipped_low=low, clipped_high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinforce:
    """The score-function loss -A·logp, without ratio or clipping.

    Unbiased for samples of the live policy only: meant for one update per rollout. (Williams,
    1992; GPG, 2504.02546.)
    """

    kind: Literal["reinforce"] = "reinforce"
    level: ClassVar[Level] = "token"
    uses_clip: ClassVar[bool] = False
    bypass: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Loss -A·logp [B, T]; nothing is clipped."""
        flags = nowhere(advantage)
        return TokenLoss(loss=-(advantage * live.logp), clipped_low=flags, clipped_high=flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """The unclipped importance-weighted loss -ρ·A, gradient through ρ.

    Alone it has no trust region; it is meant to go with a correction that rejects tokens
    (IcePop, 2510.18855) or with ``bypass``, where ρ runs from the engine's policy.
    """

    kind: Literal["importance"] = "importance"
    bypass: bool = False
    level: ClassVar[Level] = "token"
    uses_clip: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Loss -ρ·A [B, T]; nothing is clipped."""
        flags = nowhere(advantage)
        loss = -(log_ratio(live.logp, old_logp).exp() * advantage)
        return TokenLoss(loss=loss, clipped_low=flags, clipped_high=flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cispo:
    """CISPO: -sg[clip(ρ, w_min, w_max)]·A·logp. Every token keeps a gradient.

    ``w_max`` is the bound on the ratio itself, not a distance from 1; ``w_min = None`` leaves
    the lower side open, as published. ``bypass`` takes ρ against the engine (ScaleRL,
    2510.13786, with w_max 4 to 8).

    Source: MiniMax-M1, 2506.13585, eq. 4.
    """

    kind: Literal["cispo"] = "cispo"
    w_max: float = 5.0
    w_min: float | None = None
    bypass: bool = False
    level: ClassVar[Level] = "token"
    uses_clip: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(
            self.w_max >= 1,
            "Cispo.w_max",
            self.w_max,
            "bounds the ratio itself, so it must be at least 1; 5.0 is usual",
        )
        require(
            self.w_min is None or 0 <= self.w_min <= 1,
            "Cispo.w_min",
            self.w_min,
            "bounds the ratio from below, so it must be in [0, 1], or unset",
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
        """Weighted score-function loss [B, T]; the flags say where the weight is at a bound."""
        ratio = log_ratio(live.logp.detach(), old_logp).exp()
        low = nowhere(ratio) if self.w_min is None else ratio < self.w_min
        weight = ratio.clamp(min=self.w_min, max=self.w_max)
        loss = -(weight * advantage * live.logp)
        return TokenLoss(loss=loss, clipped_low=low, clipped_high=ratio > self.w_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sapo:
    """SAPO's soft gate: -A·(4/τ)·sigmoid(τ(ρ-1)), τ = tau_pos if A > 0 else tau_neg.

    The gradient weight 4σ'(τ(ρ-1))·ρ is 1 at ρ = 1 and fades on both sides. At ρ = 1 the value
    is -2A/τ, not -A: only gradients compare with PPO's.

    Source: Gao et al., 2511.20347.
    """

    kind: Literal["sapo"] = "sapo"
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    level: ClassVar[Level] = "token"
    uses_clip: ClassVar[bool] = False
    bypass: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(self.tau_pos > 0, "Sapo.tau_pos", self.tau_pos, "must be positive")
        require(self.tau_neg > 0, "Sapo.tau_neg", self.tau_neg, "must be positive")

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        selected: Bool[Tensor, "B T"] | None,
    ) -> TokenLoss:
        """Gated loss [B, T]; nothing is clipped."""
        ratio = log_ratio(live.logp, old_logp).exp()
        tau = torch.where(advantage > 0, self.tau_pos, self.tau_neg).to(ratio.dtype)
        # sigmoid(x) as (1 + tanh(x/2)) / 2: torch's sigmoid rounds vector lanes and leftovers
        # differently, which would make a row's loss depend on its place in the micro-batch.
        gate = (2 / tau) * (1 + torch.tanh(tau * (ratio - 1) / 2))
        flags = nowhere(ratio)
        return TokenLoss(loss=-(advantage * gate), clipped_low=flags, clipped_high=flags)
