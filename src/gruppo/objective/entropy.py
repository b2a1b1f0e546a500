"""Entropy of the token distributions: from logits, and as a term of the loss.

``logp_and_entropy`` works on whole logits and is the plain statement of the formula; training on
large vocabularies uses the chunked form of ``gruppo.model.logprob``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.objective._check import require
from gruppo.objective.control import AdaptiveEntropy


def logp_and_entropy(
    logits: Float[Tensor, "*rows V"], tokens: Int[Tensor, "*rows"], *, temperature: float = 1.0
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Log-probability of ``tokens`` and entropy -Σπ log π, in nats, at the sampling temperature.

    Logits go to float32 (or wider) before the division. ∂H/∂z = -π(log π + H)/τ.

    Args:
        logits: [..., V].
        tokens: [...], the drawn ids.
        temperature: τ > 0, the one used for sampling.

    Returns:
        (logp, entropy), both [...].

    Raises:
        ValueError: the temperature is not positive.

    Example:
        >>> logp, entropy = logp_and_entropy(torch.zeros(1, 4), torch.tensor([2]))
        >>> round(logp.item(), 4), round(entropy.item(), 4)
        (-1.3863, 1.3863)
    """
    require(temperature > 0, "temperature", temperature, "must be positive")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = (wide / temperature).log_softmax(dim=-1)
    # Selected, so that a filtered-out token (probability 0, log -inf) adds 0 and not NaN.
    share = torch.where(logp.isfinite(), logp.exp() * logp, 0)
    chosen = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen, -share.sum(dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyTerm:
    """An entropy bonus -α·H in the loss, H with the policy term's row coefficients.

    ``coef = 0`` without ``adaptive`` is off. With ``adaptive`` (Skywork-OR1, 2505.22312) α is
    what the controller says and ``coef`` its start value. Fixed bonuses of 1e-3 to 1e-2 are
    usual; large vocabularies can explode in entropy under them.
    """

    coef: float = 0.0
    adaptive: AdaptiveEntropy | None = None
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(
            self.coef >= 0,
            "EntropyTerm.coef",
            self.coef,
            "must not be negative: entropy is rewarded; 0 is off",
        )
