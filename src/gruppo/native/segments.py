"""Attention over the parts of a packed row, and its gradient, in one call each.

Queries are ordered by key head: ``[K, N, R, D]`` with ``R`` query heads to each of ``K`` key heads.
Scores, weights and sums are float32; products are of the tensors' own type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.native.compiled import TYPES, kernel, kernels

PartNumbers = tuple[int, int, int, int, bool]
"""First query, end of queries, first key, end of keys, and whether a query sees no later key."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which queries see which keys; ``scale`` multiplies scores.

    The keys of a causal part end where its queries do. A key that several parts give to a query
    counts several times.
    """

    parts: Sequence[PartNumbers]
    scale: float


def can_attend_parts(query: Tensor) -> bool:
    """Whether there are kernels for attention with such queries.

    Tensors of other classes than torch's own may have no memory to read (fake ones), or not all.
    """
    plain = type(query) is Tensor and query.device.type == "cpu"
    taken = query.dtype in TYPES and query.shape[-1] % 2 == 0
    return plain and taken and kernels() is not None


def attend_parts(
    query: Float[Tensor, "K N R D"],
    key: Float[Tensor, "K N D"],
    value: Float[Tensor, "K N D"],
    pattern: Pattern,
    *,
    out: Float[Tensor, "N H D"],
) -> Float[Tensor, "K N R"]:
    """Write the attention of all queries to ``out``; returns log-sum-exps in float32.

    Args:
        query: of all positions.
        key: of the same.
        value: what the weights multiply.
        pattern: what sees what; a query that sees no key gets 0, and a log-sum-exp of -inf.
        out: H = K R heads.

    Raises:
        MemoryError: there is not enough for copies of keys and values.
    """
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    _call("segments_forward", pattern, (query, key, value, out), (lse,))
    return lse


def attend_parts_backward(
    query: Float[Tensor, "K N R D"],
    key: Float[Tensor, "K N D"],
    value: Float[Tensor, "K N D"],
    pattern: Pattern,
    *,
    out: Float[Tensor, "N H D"],
    lse: Float[Tensor, "K N R"],
    grad: Float[Tensor, "N H D"],
) -> tuple[Float[Tensor, "K N R D"], Float[Tensor, "K N D"], Float[Tensor, "K N D"]]:
    """Gradients of queries, keys and values, in float32, from ``grad``, that of ``out``.

    The other arguments are those of :func:`attend_parts`, and what it made.
    """
    found = tuple(torch.empty_like(x, dtype=torch.float32) for x in (query, key, value))
    _call("segments_backward", pattern, (query, key, value, out), (lse, grad, *found))
    return found[0], found[1], found[2]


def _call(
    name: str,
    pattern: Pattern,
    given: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
) -> None:
    query, key, value, out = given
    heads, length, repeats, width = query.shape
    assert key.shape == value.shape == (heads, length, width), "keys of the same heads"
    assert out.shape == (length, heads * repeats, width), "an output for every query"
    assert all(x.is_contiguous() for x in (*given, *others)), "buffers are whole"
    lse, *grads = others
    assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32), "a sum for every query"
    assert not grads or grads[0].shape == out.shape, "a gradient for every output"
    assert all(x.dtype == query.dtype for x in (*given, *grads[:1])), "one type of numbers"
    assert width % 2 == 0, "numbers are read in pairs"
    for first, end, first_key, end_key, causal in pattern.parts:
        assert 0 <= first <= end <= length, "queries of the row"
        assert 0 <= first_key <= end_key <= length, "keys of the row"
        assert not causal or (end == end_key and first_key <= first), "each query sees its own key"
    numbers = [int(number) for part in pattern.parts for number in part]
    table = (ctypes.c_int64 * len(numbers))(*numbers)
    sizes = (heads, length, repeats, width, len(pattern.parts))
    pointers = [x.data_ptr() for x in (*given, *others)]
    kinds = "iiiiif" + "p" * (1 + len(pointers))
    run = kernel(f"{name}_{TYPES[query.dtype]}", kinds, ctypes.c_int64)
    run(*sizes, pattern.scale, ctypes.addressof(table), *pointers)
