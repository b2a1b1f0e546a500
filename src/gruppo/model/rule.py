"""What a model does to its logits before the softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRule:
    """What happens to raw logits before the softmax: scale, soft cap, temperature, in this order.

    ``softcap`` c is Gemma 2's ``c * tanh(z / c)`` (arXiv:2408.00118, section 2).
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Ruled logits; never in place, as autograd may need the raw ones."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if self.temperature == 1.0 else logits / self.temperature

    @property
    def slope(self) -> float:
        """What raw logits are multiplied by, where there is no soft cap."""
        return self.scale / self.temperature

    def chain_(
        self, gradient: Float[Tensor, "N V"], logits: Float[Tensor, "N V"]
    ) -> Float[Tensor, "N V"]:
        """Turn the gradient of the ruled ``logits`` into that of the raw ones (both clobbered)."""
        if self.softcap is not None:
            slope = logits.mul_(self.temperature / self.softcap).square_().neg_().add_(1.0)
            gradient.mul_(slope)
        if self.scale != self.temperature:
            gradient.mul_(self.slope)
        return gradient
