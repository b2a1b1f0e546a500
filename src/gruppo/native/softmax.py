"""Log-softmax over a large vocabulary, picked and differentiated in one pass each.

With y = scale * z, p the softmax of y and H its entropy: ``d log p[token] / dy = onehot - p`` and
``dH / dy = -p (log p + H)``. It makes no logits; the head does.
"""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.native.compiled import kernels


def has_softmax(logits: Tensor) -> bool:
    """Whether ``pick`` and ``pick_gradient_`` can take such logits here."""
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and kernels() is not None


def pick(
    logits: Float[Tensor, "N V"], tokens: Int[Tensor, "N"], *, scale: float, entropy: bool
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Log-probability of each row's token, log-sum-exp, and entropy (0 unless asked), in nats.

    Only for what ``has_softmax``; logits are contiguous. Sums are in float32 over blocks and in
    float64 over these. A logit of -inf is a probability of 0; NaN gives NaN.
    """
    logp, lse = torch.empty(2, len(logits)).unbind()
    spread = torch.zeros(len(logits))
    _call(
        "softmax_forward_float32",
        scale,
        [logits, tokens, logp, lse, spread if entropy else None],
    )
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
    rest = [tokens, lse, entropy, grad_logp, grad_entropy]
    _call("softmax_backward_float32", scale, [logits, *rest])
    return logits


def _call(name: str, scale: float, tensors: list[Tensor | None]) -> None:
    """Call a kernel with the sizes of the first tensor, ``scale`` and all tensors."""
    compiled = kernels()
    assert compiled is not None, "has_softmax was asked before"
    logits, tokens = tensors[:2]
    assert logits is not None, "logits come first"
    assert tokens is not None, "then tokens"
    rows, width = logits.shape
    low, high = tokens.aminmax() if rows else (0, 0)
    assert 0 <= low <= high < width, "tokens are within the vocabulary"
    assert all(t is None or t.is_contiguous() for t in tensors), "buffers are whole"
    pointers = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors)
    compiled[name]((ctypes.c_int64 * 2)(rows, width), ctypes.c_float(scale), *pointers)
