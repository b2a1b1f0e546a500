"""Which tokens take part in the policy term.

Two kinds. A *keep* judges one row by itself inside the training forward. A *selection* needs
statistics over the whole optimizer step (quantiles, covariances, a random choice), so it is
computed once per step, over all its rows and without gradient, and shipped with them: a row's
loss then does not depend on which rows share its micro-batch.

Neither touches the normaliser: a dropped token keeps its place in the counts. Neither touches the
KL and entropy terms. Statistics are those of the rows given; over several ranks each rank
selects among its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gruppo.objective._check import require
from gruppo.objective.sequence import row_mean
from gruppo.objective.surrogate import Live, log_ratio

Role = Literal["keep", "drop", "penalise"]


@runtime_checkable
class Keep(Protocol):
    """Judges tokens inside the training forward; rows must not see each other."""

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
    ) -> Bool[Tensor, "B T"]:
        """True where the token takes part in the policy term."""
        ...


@runtime_checkable
class Select(Protocol):
    """Chooses tokens once per optimizer step.

    ``role`` says what being chosen means: kept (alone), dropped, or penalised by the surrogate.
    """

    @property
    def role(self) -> Role:
        """What happens to the chosen tokens."""
        ...

    @property
    def needs_entropy(self) -> bool:
        """Does the choice read the entropy."""
        ...

    def __call__(
        self,
        logp: Float[Tensor, "B T"],
        entropy: Float[Tensor, "B T"] | None,
        *,
        old_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        seed: int,
    ) -> Bool[Tensor, "B T"]:
        """The chosen tokens, a subset of ``mask``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OffPolicySequenceMask:
    """Drop tokens with A < 0 in rows that have drifted: mean_t (engine_logp - logp) > delta.

    The row mean estimates KL(sampler ‖ live). Learning from a bad sample that the live policy
    would hardly draw any more does harm; from a good one it does not. .5 is what TRL suggests,
    slime's default is 1e-4.

    Source: DeepSeek-V3.2, 2512.02556, "off-policy sequence masking".
    """

    kind: Literal["opsm"] = "opsm"
    delta: float
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(self.delta > 0, "OffPolicySequenceMask.delta", self.delta, "must be positive")

    def __call__(
        self,
        live: Live,
        *,
        old_logp: Float[Tensor, "B T"],
        engine_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
    ) -> Bool[Tensor, "B T"]:
        """False on tokens of negative advantage in drifted rows."""
        drift = row_mean(engine_logp - live.logp.detach(), live.mask)
        return ~((advantage < 0) & (drift > self.delta))


@dataclass(frozen=True, slots=True, kw_only=True)
class TopEntropy:
    """Keep the ``fraction`` of tokens with the highest entropy (forking tokens).

    Kept iff H ≥ the (1 - fraction) quantile of H over all trained tokens of the step, linearly
    interpolated. Source: Wang et al., 2506.01939.

    Example:
        >>> h = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
        >>> all_ = torch.ones(1, 5, dtype=torch.bool)
        >>> TopEntropy(fraction=0.4)(h, h, old_logp=h, advantage=h, mask=all_, seed=0)
        tensor([[False, False, False,  True,  True]])
    """

    kind: Literal["top_entropy"] = "top_entropy"
    fraction: float = 0.2
    role: ClassVar[Role] = "keep"
    needs_entropy: ClassVar[bool] = True
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(
            0 < self.fraction < 1,
            "TopEntropy.fraction",
            self.fraction,
            "must be in (0, 1); leave the selection out to keep every token",
        )

    def __call__(
        self,
        logp: Float[Tensor, "B T"],
        entropy: Float[Tensor, "B T"] | None,
        *,
        old_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        seed: int,
    ) -> Bool[Tensor, "B T"]:
        """The kept tokens."""
        assert entropy is not None, "needs_entropy asks for it"
        if not mask.any():
            return mask
        return mask & (entropy >= _quantile(entropy[mask], 1 - self.fraction))


def _quantile(values: Float[Tensor, "N"], level: float) -> Float[Tensor, ""]:
    """Linearly interpolated quantile; torch.quantile refuses more than 2^24 values."""
    ordered = values.sort().values
    place = level * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def token_covariance(
    logp: Float[Tensor, "B T"], advantage: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Each token's share of Cov(A, logp): (A - mean A)(logp - mean logp), 0 under the mask.

    Its mean predicts the change of entropy of the next update. (Cui et al., 2505.22617.)
    """
    count = mask.sum().clamp(min=1)
    centred = (
        values - values.sum() / count
        for values in (torch.where(mask, advantage, 0), torch.where(mask, logp.detach(), 0))
    )
    left, right = centred
    return torch.where(mask, left * right, 0)


def _num_chosen(fraction: float, mask: Bool[Tensor, "B T"]) -> int:
    """``fraction`` of the trained tokens, at least one, as in verl."""
    return max(1, int(fraction * int(mask.sum())))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipCov:
    """Drop a random ``fraction`` of the step's tokens among those of high covariance.

    Eligible are unclipped tokens with covariance in (low, high). ``eps_low`` and ``eps_high``
    are the surrogate's clip range (``Objective`` compares them). The choice is seeded, over all
    rows of the step, and takes at least one token if any is eligible.

    Source: Clip-Cov, Cui et al., 2505.22617.
    """

    kind: Literal["clip_cov"] = "clip_cov"
    fraction: float = 2e-4
    low: float = 1.0
    high: float = 5.0
    eps_low: float = 1.0
    eps_high: float = 1.0
    role: ClassVar[Role] = "drop"
    needs_entropy: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "ClipCov.fraction", self.fraction, "must be in (0, 1]")
        require(self.low < self.high, "ClipCov.low", self.low, f"must be below high = {self.high}")

    def __call__(
        self,
        logp: Float[Tensor, "B T"],
        entropy: Float[Tensor, "B T"] | None,
        *,
        old_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        seed: int,
    ) -> Bool[Tensor, "B T"]:
        """The dropped tokens."""
        covariance = token_covariance(logp, advantage, mask)
        ratio = log_ratio(logp.detach(), old_logp).exp()
        clipped = ((advantage < 0) & (ratio < 1 - self.eps_low)) | (
            (advantage > 0) & (ratio > 1 + self.eps_high)
        )
        eligible = mask & ~clipped & (covariance > self.low) & (covariance < self.high)
        return _random_subset(eligible, _num_chosen(self.fraction, mask), seed)


def _random_subset(eligible: Bool[Tensor, "B T"], count: int, seed: int) -> Bool[Tensor, "B T"]:
    """At most ``count`` of the eligible places, drawn on the host so that devices agree."""
    places = eligible.flatten().nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(places), generator=generator)[:count].to(places.device)
    chosen = torch.zeros_like(eligible).flatten()
    chosen[places[drawn]] = True
    return chosen.view_as(eligible)


@dataclass(frozen=True, slots=True, kw_only=True)
class KlCovTokens:
    """Choose the ``fraction`` of tokens of highest covariance, to be penalised by ``KlCov``.

    2e-3 is published for 7B, 2e-4 for 32B models; at least one token. Source: KL-Cov, Cui et
    al., 2505.22617.
    """

    kind: Literal["kl_cov"] = "kl_cov"
    fraction: float = 2e-3
    role: ClassVar[Role] = "penalise"
    needs_entropy: ClassVar[bool] = False
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "KlCovTokens.fraction", self.fraction, "must be in (0, 1]")

    def __call__(
        self,
        logp: Float[Tensor, "B T"],
        entropy: Float[Tensor, "B T"] | None,
        *,
        old_logp: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        seed: int,
    ) -> Bool[Tensor, "B T"]:
        """The penalised tokens; ties go to the earlier place."""
        covariance = token_covariance(logp, advantage, mask)[mask]
        order = covariance.argsort(descending=True, stable=True)
        chosen = torch.zeros_like(covariance, dtype=torch.bool)
        chosen[order[: _num_chosen(self.fraction, mask)]] = True
        return torch.zeros_like(mask).masked_scatter(mask, chosen)
