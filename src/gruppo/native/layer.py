"""What a decoder layer does to one token a row between its matrix products.

Tensors are contiguous and on the CPU; products are in float32 or bfloat16 (``can_attend`` tells of
both). No weights of matrices, no attention.
"""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.native.compiled import TYPES, kernel


def add_norm(
    hidden: Float[Tensor, "N E"],
    update: Float[Tensor, "N E"] | None,
    weight: Float[Tensor, "E"],
    *,
    epsilon: float,
    dtype: torch.dtype,
) -> Float[Tensor, "N E"]:
    """Add ``update`` to ``hidden`` in place; return the sum's RMS norm (arXiv:1910.07467, eq. 4).

    Args:
        hidden: the residual stream, in float32 or in ``dtype``.
        update: in ``dtype``; None adds nothing.
        weight: in float32.
        epsilon: added to the mean of squares.
        dtype: of the result.
    """
    rows, width = hidden.shape
    out = torch.empty_like(hidden, dtype=dtype)
    given = (hidden, weight, out) if update is None else (hidden, update, weight, out)
    assert all(tensor.is_contiguous() for tensor in given), "rows are whole"
    assert weight.dtype == torch.float32
    assert update is None or update.dtype == dtype
    name = f"add_norm_{TYPES[hidden.dtype]}_{TYPES[dtype]}"
    added = None if update is None else update.data_ptr()
    kernel(name, "iifpppp")(
        rows, width, epsilon, hidden.data_ptr(), added, weight.data_ptr(), out.data_ptr()
    )
    return out


def swiglu(gate_up: Float[Tensor, "N J"]) -> Float[Tensor, "N I"]:
    """``silu(gate) * up`` of ``gate_up = [gate, up]``, so ``J = 2 I`` (arXiv:2002.05202, eq. 6)."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width))
    assert gate_up.is_contiguous(), "rows are whole"
    name = f"swiglu_{TYPES[gate_up.dtype]}"
    kernel(name, "iipp")(rows, width, gate_up.data_ptr(), out.data_ptr())
    return out


def rotate_and_keep(
    packed: Float[Tensor, "N X"],
    cosine: Float[Tensor, "N D"],
    sine: Float[Tensor, "N D"],
    *,
    norms: tuple[tuple[Float[Tensor, "D"], float] | None, tuple[Float[Tensor, "D"], float] | None],
    own_length: Int[Tensor, "N"],
    own_keys: Float[Tensor, "S K C D"],
    own_values: Float[Tensor, "S K C D"],
) -> Float[Tensor, "N H D"]:
    """Rotated queries; rotated keys and the values are written to the rows' own buffers.

    Args:
        packed: queries, keys and values side by side, ``X = (H + 2 K) D``.
        cosine: of the rotary embedding (arXiv:2104.09864, eq. 34), both halves, in float32.
        sine: alike.
        norms: weight (float32) and epsilon of the RMS norms of a query's and a key's heads, which
            come before the rotation; None for none.
        own_length: column that row ``n`` writes.
        own_keys: in the type of ``packed``; row ``n`` is slot ``n``.
        own_values: alike.
    """
    rows, (_, key_heads, columns, width) = len(packed), own_keys.shape
    heads = packed.shape[1] // width - 2 * key_heads
    query = packed.new_empty((rows, heads, width))
    (query_weight, query_epsilon), (key_weight, key_epsilon) = (n or (None, 0.0) for n in norms)
    given = (packed, cosine, sine, own_length, own_keys, own_values)
    assert all(tensor.is_contiguous() for tensor in given), "buffers are whole"
    assert packed.dtype == own_keys.dtype == own_values.dtype
    assert own_values.shape == own_keys.shape
    assert cosine.dtype == sine.dtype == torch.float32
    assert own_length.dtype == torch.int64, "indices are int64"
    assert cosine.shape == sine.shape == (rows, width)
    kernel(f"rotate_{TYPES[packed.dtype]}", "iiiiiffppppppppp", ctypes.c_int64)(
        *(rows, heads, key_heads, width, columns, query_epsilon, key_epsilon),
        *(packed.data_ptr(), cosine.data_ptr(), sine.data_ptr()),
        *(None if weight is None else weight.data_ptr() for weight in (query_weight, key_weight)),
        *(own_length.data_ptr(), query.data_ptr(), own_keys.data_ptr(), own_values.data_ptr()),
    )
    return query
