"""Softmax of attention scores and its gradient, between the products of a training pass.

Rows are ordered by key head, then query, then the ``repeats`` query heads that share a key head.
With a causal mask the last query sees all keys, and each one before it one less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.native.compiled import TYPES, kernel, kernels


@dataclass(frozen=True, slots=True)
class Mask:
    """Which of the keys each row sees; ``scale`` multiplies its scores."""

    queries: int
    repeats: int
    causal: bool
    scale: float


def can_score(query: Tensor) -> bool:
    """Whether there are kernels for attention with such queries.

    Tensors of other classes than torch's own may have no memory to read (fake ones), or not all.
    """
    plain = type(query) is Tensor and query.device.type == "cpu"
    return plain and query.dtype in TYPES and kernels() is not None


def softmax_scores(
    scores: Float[Tensor, "K M S"], mask: Mask, dtype: torch.dtype
) -> tuple[Float[Tensor, "K M S"], Float[Tensor, "K M"]]:
    """Softmax over the keys in ``dtype``, and log-sum-exps, of ``scores`` in float32."""
    weights = torch.empty_like(scores, dtype=dtype)
    lse = scores.new_empty(scores.shape[:2])
    _call("scores_forward", mask, (scores, lse), (weights,))
    return weights, lse


def score_gradient(
    scores: Float[Tensor, "K M S"],
    grad: Float[Tensor, "K M S"],
    *,
    mask: Mask,
    lse: Float[Tensor, "K M"],
    delta: Float[Tensor, "K M"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "K M S"], Float[Tensor, "K M S"]]:
    """Weights p and the gradient of raw scores, ``scale * p (grad - delta)``, both in ``dtype``.

    Args:
        scores: in float32, without the scale.
        grad: of the weights.
        mask: as in the forward pass.
        lse: over all keys of the row, those of other parts too.
        delta: sum of the weights times their gradients, over all keys of the row.
        dtype: of the results.
    """
    weights, gradient = (torch.empty_like(scores, dtype=dtype) for _ in range(2))
    _call("scores_backward", mask, (scores, grad, lse, delta), (weights, gradient))
    return weights, gradient


def _call(name: str, mask: Mask, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
    heads, rows, columns = given[0].shape
    assert rows == mask.queries * mask.repeats, "rows are queries times query heads"
    assert not mask.causal or mask.queries <= columns, "every query sees a key"
    assert all(tensor.is_contiguous() for tensor in (*given, *made)), "buffers are whole"
    assert all(tensor.dtype == torch.float32 for tensor in given), "what is read is float32"
    sizes = (heads * rows, columns, mask.queries, mask.repeats, int(mask.causal), mask.scale)
    kinds = "iiiiif" + "p" * len(given + made)
    pointers = (tensor.data_ptr() for tensor in (*given, *made))
    kernel(f"{name}_{TYPES[made[0].dtype]}", kinds)(*sizes, *pointers)
