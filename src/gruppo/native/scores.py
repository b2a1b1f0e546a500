"""Softmax of attention scores and its gradient, between the products of a training pass.

Queries are ordered by key head: ``[K, Q, R, D]`` with ``R`` query heads to each of ``K`` key heads.
Weights are matrices ``[K, Q R, S]`` over S keys. With a causal mask the last query sees all keys,
and each one before it one less. Scores are sums in float32, whatever the type of the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.native.compiled import TYPES, kernel, kernels


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query sees: all or, ``causal``, up to its own; ``scale`` multiplies scores."""

    causal: bool
    scale: float


def can_score(query: Tensor) -> bool:
    """Whether there are kernels for attention with such queries.

    Tensors of other classes than torch's own may have no memory to read (fake ones), or not all.
    """
    plain = type(query) is Tensor and query.device.type == "cpu"
    taken = query.dtype in TYPES and query.shape[-1] % 2 == 0
    return plain and taken and kernels() is not None


def softmax_scores(
    query: Float[Tensor, "K Q R D"], key: Float[Tensor, "K S D"], mask: Mask
) -> tuple[Float[Tensor, "K M S"], Float[Tensor, "K M"]]:
    """Softmax over the keys, in the queries' type, and log-sum-exps in float32."""
    weights, lse = _weights(query, key), query.new_empty(_rows(query), dtype=torch.float32)
    if lse.numel():  # no rows lie in no order that could be asked for
        sizes = _sizes(query, key, mask)
        _call("scores_forward", sizes, mask.scale, (query, key), (lse, weights))
    return weights, lse


def score_gradient(
    query: Float[Tensor, "K Q R D"],
    key: Float[Tensor, "K S D"],
    value: Float[Tensor, "K S D"],
    grad: Float[Tensor, "K Q R D"],
    *,
    mask: Mask,
    lse: Float[Tensor, "K Q R"],
    delta: Float[Tensor, "K Q R"],
) -> tuple[Float[Tensor, "K M S"], Float[Tensor, "K M S"]]:
    """Weights p and the gradient of scores, ``scale * p (grad @ value.mT - delta)``.

    Args:
        query: as in the forward pass.
        key: their keys.
        value: what the weights multiply.
        grad: of the output.
        mask: as in the forward pass.
        lse: over all keys of the row, those of other parts too; in float32.
        delta: sum of the weights times their gradients, over all keys of the row; in float32.
    """
    weights, gradient = (_weights(query, key) for _ in range(2))
    if not weights.numel():
        return weights, gradient
    assert _apart(grad) == _apart(query), "gradients lie as the queries do"
    assert _apart(value) == _apart(key), "values lie as the keys do"
    assert lse.dtype == delta.dtype == torch.float32, "sums are float32"
    for sums in (lse, delta):
        assert _apart(sums) * _width(query) == _apart(query), "one for every row of the queries"
    sizes, given = _sizes(query, key, mask), (query, key, value, grad)
    _call("scores_backward", sizes, mask.scale, given, (lse, delta, weights, gradient))
    return weights, gradient


def _rows(query: Tensor) -> tuple[int, int]:
    heads, queries, repeats, _ = query.shape
    return heads, queries * repeats


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return query.new_empty(*_rows(query), key.shape[1])


def _sizes(query: Tensor, key: Tensor, mask: Mask) -> tuple[int, ...]:
    """Shapes, the mask, and from one head to the next: in rows of queries and in keys."""
    heads, queries, repeats, width = query.shape
    assert key.shape[::2] == (heads, width), "keys of the same heads"
    assert not mask.causal or queries <= key.shape[1], "every query sees a key"
    apart = _apart(query) // _width(query), _apart(key) // _width(key)
    return heads, queries, repeats, key.shape[1], width, int(mask.causal), *apart


def _width(tensor: Tensor) -> int:
    """How far a row is from the next one; rows of no numbers lie as those of one."""
    return max(tensor.shape[-1], 1)


def _apart(tensor: Tensor) -> int:
    """How far a head is from the next one; its own numbers lie one after another."""
    assert tensor[0].is_contiguous(), "a head's numbers are whole"
    return tensor.stride(0) if len(tensor) > 1 else 0


def _call(
    name: str,
    sizes: tuple[int, ...],
    scale: float,
    given: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
) -> None:
    dtype = given[0].dtype
    assert all(tensor.dtype == dtype for tensor in given), "one type of numbers"
    pointers = [tensor.data_ptr() for tensor in (*given, *others)]
    kinds = "i" * len(sizes) + "f" + "p" * len(pointers)
    kernel(f"{name}_{TYPES[dtype]}", kinds)(*sizes, scale, *pointers)
