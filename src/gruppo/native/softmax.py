"""Log-softmax over a large vocabulary, picked and differentiated in one pass each.

With y = scale * z, p the softmax of y and H its entropy: ``d log p[token] / dy = onehot - p`` and
``dH / dy = -p (log p + H)``. It makes no logits; the head does.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.native.compiled import TYPES, kernel, kernels


def can_softmax(logits: Tensor) -> bool:
    """Whether ``pick`` and ``pick_gradient_`` can take such logits here."""
    return logits.device.type == "cpu" and logits.dtype in TYPES and kernels() is not None


def pick(
    logits: Float[Tensor, "N V"], tokens: Int[Tensor, "N"], *, scale: float, entropy: bool
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Log-probability of each row's token, log-sum-exp, and entropy (0 unless asked), in nats.

    Only for what ``can_softmax``; logits are contiguous, results float32. Sums are in
    float32 over blocks and in float64 over these. A logit of -inf is a probability of 0; NaN gives
    NaN.
    """
    logp, lse, spread = logits.new_zeros(3, len(logits), dtype=torch.float32).unbind()
    floats = [logp, lse, spread if entropy else None]
    _call("softmax_forward", "iifppppp", scale, logits, tokens, floats)
    return logp, lse, spread


def pick_gradient_(
    logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, "N"],
    *,
    scale: float,
    lse: Float[Tensor, "N"],
    entropy: Float[Tensor, "N"],
    grad_logp: Float[Tensor, "N"],
    grad_entropy: Float[Tensor, "N"] | None,
) -> Float[Tensor, "N V"]:
    """Turn ``logits`` into the gradient with respect to them; in place."""
    floats = [lse, entropy, grad_logp, grad_entropy]
    _call("softmax_backward", "iifpppppp", scale, logits, tokens, floats)
    return logits


def _call(
    name: str,
    kinds: str,
    scale: float,
    logits: Tensor,
    tokens: Tensor,
    floats: list[Tensor | None],
) -> None:
    """Call a kernel with the sizes of ``logits``, ``scale`` and all tensors."""
    rows, width = logits.shape
    tokens = tokens.to(torch.int64)
    low, high = tokens.aminmax() if rows else (0, 0)
    assert 0 <= low <= high < width, "tokens are within the vocabulary"
    given = [logits, tokens, *floats]
    assert all(t is None or t.is_contiguous() for t in given), "buffers are whole"
    assert all(t is None or t.dtype == torch.float32 for t in floats), "all but logits is float32"
    pointers = (None if t is None else t.data_ptr() for t in given)
    kernel(f"{name}_{TYPES[logits.dtype]}", kinds)(rows, width, scale, *pointers)
