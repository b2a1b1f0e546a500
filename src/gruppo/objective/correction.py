"""Correction of the policy term for tokens drawn by an inference engine that is not the trainer.

Even with equal weights an engine's kernels, precision and filters differ from the trainer's, so
the sampling probabilities π_engine are not π_old. A correction turns x = old_logp - engine_logp
into detached weights and keep masks. They multiply the policy term alone; KL, entropy and the
normaliser never see them, and a rejected token keeps its place in the counts.

The unbiased weight is the product over the whole completion, whose variance grows exponentially
with the length: 1.01 per token is 2.7 after 100 tokens and 20959 after 1000. Token forms ignore
the prefix, with little variance. Where the engine gave no log-probability (NaN), x = 0.

``mismatch`` measures the difference, whether or not it is corrected. No thresholds or advice here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gruppo.objective._check import require
from gruppo.objective.sequence import row_mean, row_sum
from gruppo.objective.token import LOG_RATIO_LIMIT

Weighted = tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]


@runtime_checkable
class Correction(Protocol):
    """Weights and keep mask from the mismatch between trainer and engine."""

    @property
    def per_step(self) -> bool:
        """True if the weights depend on other rows: then all rows of a step are needed at once."""
        ...

    def __call__(
        self,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Weighted:
        """(weight, keep), both detached; rejected and masked tokens have weight 0."""
        ...


def engine_log_ratio(
    old_logp: Float[Tensor, "B T"],
    engine_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """X = clamp(old_logp - engine_logp, ±20), detached; 0 under the mask and where NaN.

    >>> old, nan = torch.tensor([[-1.0, -1.0]]), float("nan")
    >>> engine_log_ratio(old, torch.tensor([[-1.5, nan]]), torch.tensor([[True, True]]))
    tensor([[0.5000, 0.0000]])
    """
    known = mask & engine_logp.isfinite()
    x = torch.where(known, old_logp.detach() - engine_logp.detach(), 0)
    return x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def sequence_ratio(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """Ratio of whole completions, exp(clamp(Σ_t x, ±20))."""
    return row_sum(x, mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def geometric_ratio(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """Length-normalised ratio of completions, exp(mean_t x)."""
    return row_mean(x, mask).exp()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What every correction offers besides its own rule."""

    veto: float | None
    batch_normalize: bool


def _finish(
    weight: Float[Tensor, "B #T"],
    keep: Bool[Tensor, "B #T"],
    x: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    options: _Options,
) -> Weighted:
    """Apply veto and normalisation, and spread row weights over their tokens."""
    keep = mask & keep
    if options.veto is not None:
        vetoed = (mask & (x < math.log(options.veto))).any(dim=1, keepdim=True)
        keep = keep & ~vetoed
    weight = torch.where(keep, weight, 0)
    if options.batch_normalize:
        total = weight.sum()
        weight = torch.where(total > 0, weight * (mask.sum() / total.clamp(min=1e-30)), weight)
    return weight, keep


def _require_options(name: str, veto: float | None) -> None:
    require(
        veto is None or 0 < veto < 1,
        f"{name}.veto",
        veto,
        "rejects a row with any token ratio below it, so it must be in (0, 1); 1e-4 is usual",
    )


def _require_band(name: str, low: float | None, high: float) -> None:
    require(high >= 1, f"{name}.max", high, "must be at least 1, the ratio of equal policies")
    require(low is None or 0 <= low <= 1, f"{name}.min", low, "must be in [0, 1], or unset")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTruncate:
    """Truncated importance sampling per token: weight min(e^x, max).

    ``min`` bounds it from below too. ``veto`` rejects rows with any token ratio below it.
    ``batch_normalize`` scales the weights of a step to mean 1 over its trained tokens.

    Sources: Yao et al., "Your efficient RL framework secretly brings you off-policy RL
    training", 2025 (TIS); verl and slime use max = 2.

    Example:
        >>> old, engine = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-3.0, -1.0]])
        >>> TokenTruncate()(old, engine, torch.tensor([[True, True]]))[0]
        tensor([[2., 1.]])
    """

    kind: Literal["token_truncate"] = "token_truncate"
    max: float = 2.0
    min: float | None = None
    veto: float | None = None
    batch_normalize: bool = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require_band("TokenTruncate", self.min, self.max)
        _require_options("TokenTruncate", self.veto)

    @property
    def per_step(self) -> bool:
        """True with ``batch_normalize``."""
        return self.batch_normalize

    def __call__(
        self,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Weighted:
        """Truncated weights; everything is kept unless vetoed."""
        x = engine_log_ratio(old_logp, engine_logp, mask)
        weight = x.exp().clamp(min=self.min, max=self.max)
        options = _Options(veto=self.veto, batch_normalize=self.batch_normalize)
        return _finish(weight, mask, x, mask, options)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMask:
    """IcePop: weight e^x for tokens with min ≤ e^x ≤ max, other tokens are rejected.

    Suited to mixture-of-experts models, where a different routing makes single tokens disagree
    strongly. ``veto`` and ``batch_normalize`` as in ``TokenTruncate``. Source: 2510.18855.
    """

    kind: Literal["token_mask"] = "token_mask"
    min: float = 0.5
    max: float = 5.0
    veto: float | None = None
    batch_normalize: bool = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require_band("TokenMask", self.min, self.max)
        _require_options("TokenMask", self.veto)

    @property
    def per_step(self) -> bool:
        """True with ``batch_normalize``."""
        return self.batch_normalize

    def __call__(
        self,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Weighted:
        """Token ratios inside the band."""
        x = engine_log_ratio(old_logp, engine_logp, mask)
        weight = x.exp()
        options = _Options(veto=self.veto, batch_normalize=self.batch_normalize)
        return _finish(weight, (weight >= self.min) & (weight <= self.max), x, mask, options)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTruncate:
    """Truncated importance sampling per completion: every token weighs min(exp Σ_t x, max).

    Caps nearly every long row (see the module's text). ``veto`` and ``batch_normalize`` as in
    ``TokenTruncate``. Source: verl's sequence-level truncation.
    """

    kind: Literal["sequence_truncate"] = "sequence_truncate"
    max: float = 2.0
    veto: float | None = None
    batch_normalize: bool = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require_band("SequenceTruncate", None, self.max)
        _require_options("SequenceTruncate", self.veto)

    @property
    def per_step(self) -> bool:
        """True with ``batch_normalize``."""
        return self.batch_normalize

    def __call__(
        self,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Weighted:
        """Truncated row weights, spread over the tokens."""
        x = engine_log_ratio(old_logp, engine_logp, mask)
        weight = sequence_ratio(x, mask).clamp(max=self.max)
        options = _Options(veto=self.veto, batch_normalize=self.batch_normalize)
        return _finish(weight, mask, x, mask, options)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceMask:
    """Masked importance sampling: rows weigh exp Σ_t x, and are rejected above ``max``.

    Rejects nearly every long row that the trainer likes better (see the module's text).
    ``veto`` and ``batch_normalize`` as in ``TokenTruncate``. Source: Li et al., "When speed
    kills stability", 2025 (MIS); max = 3 is TRL's default.
    """

    kind: Literal["sequence_mask"] = "sequence_mask"
    max: float = 3.0
    veto: float | None = None
    batch_normalize: bool = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require_band("SequenceMask", None, self.max)
        _require_options("SequenceMask", self.veto)

    @property
    def per_step(self) -> bool:
        """True with ``batch_normalize``."""
        return self.batch_normalize

    def __call__(
        self,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Weighted:
        """Row weights up to ``max``, spread over the tokens."""
        x = engine_log_ratio(old_logp, engine_logp, mask)
        weight = sequence_ratio(x, mask)
        options = _Options(veto=self.veto, batch_normalize=self.batch_normalize)
        return _finish(weight, weight <= self.max, x, mask, options)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometricMask:
    """Tokens weigh e^x; rows are kept iff min ≤ exp(mean_t x) ≤ max.

    The row test does not depend on the length, which suits very long completions. The default
    band is that of NeMo-RL's and OpenRLHF's recipes; .8 to 1.3 is a loose one. ``veto`` and
    ``batch_normalize`` as in ``TokenTruncate``.
    """

    kind: Literal["geometric_mask"] = "geometric_mask"
    min: float = 0.999
    max: float = 1.002
    veto: float | None = None
    batch_normalize: bool = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require_band("GeometricMask", self.min, self.max)
        _require_options("GeometricMask", self.veto)

    @property
    def per_step(self) -> bool:
        """True with ``batch_normalize``."""
        return self.batch_normalize

    def __call__(
        self,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Weighted:
        """Token ratios of the rows inside the band."""
        x = engine_log_ratio(old_logp, engine_logp, mask)
        row = geometric_ratio(x, mask)
        options = _Options(veto=self.veto, batch_normalize=self.batch_normalize)
        return _finish(x.exp(), (row >= self.min) & (row <= self.max), x, mask, options)


def _correlation(left: Float[Tensor, "N"], right: Float[Tensor, "N"]) -> float:
    """Pearson correlation; 1 if both are equal, else 0, where one of them is constant."""
    a, b = left - left.mean(), right - right.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    if scale <= 0:
        return float(torch.equal(left, right))
    return float((a * b).sum() / scale)


def mismatch(
    old_logp: Float[Tensor, "B T"],
    engine_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    cap: float = 2.0,
) -> Mapping[str, float]:
    """Mismatch numbers over the trained tokens; with x = old_logp - engine_logp (0 where NaN).

    - ``mismatch_k1`` = mean(-x) and ``mismatch_k3`` = mean(e^x - 1 - x): two estimates of
      KL(engine ‖ trainer), in nats per token; the second is never negative.
    - ``max_abs_prob_diff`` = max |π_old - π_engine|, ``prob_correlation`` their correlation.
    - ``chi2_token`` = mean(e^{2x}) - 1, ``chi2_seq`` the same of whole completions.
    - ``ess`` = (Σw)²/(N Σw²) and ``frac_truncated`` for the weights w = min(e^x, cap).
    - ``frac_missing``: share of trained tokens without an engine log-probability.

    All are 0 (``ess`` and ``prob_correlation`` 1) when nothing is trained. For looking at whole
    tensors: a training step logs the ``is/`` sums of ``gruppo.update.live_metrics``, which add up
    over micro-batches, leave tokens without an engine log-probability out, and cap nothing.
    """
    old, engine = old_logp.detach().double(), engine_logp.detach().double()
    known = mask & engine.isfinite()
    ratios = engine_log_ratio(old, engine, mask)
    x = ratios[mask]
    rows = mask.any(dim=1)
    if x.numel() == 0:
        x, rows = x.new_zeros(1), torch.zeros_like(rows)
    weight = x.exp().clamp(max=cap)
    p, q = old[known].exp(), engine[known].exp()
    whole = sequence_ratio(ratios, mask)[rows].square()
    return {
        "mismatch_k1": float(-x.mean()),
        "mismatch_k3": float((torch.expm1(x) - x).mean()),
        "max_abs_prob_diff": float((p - q).abs().max()) if len(p) else 0.0,
        "prob_correlation": _correlation(p, q) if len(p) else 1.0,
        "chi2_token": float((2 * x).exp().mean() - 1),
        "chi2_seq": float(whole.mean() - 1) if len(whole) else 0.0,
        "ess": float(weight.sum().square() / (len(x) * weight.square().sum())),
        "frac_truncated": float((x.exp() > cap).double().mean()),
        "frac_missing": float((mask & ~known).sum() / mask.sum().clamp(min=1)),
    }
