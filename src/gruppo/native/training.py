"""What a decoder layer does between its products in a training pass, and its gradients.

The residual stream is float32, products are in float32 or bfloat16 (``can_attend_parts`` tells of
both).
Tensors are contiguous and on the CPU. Heads are ordered by key head: ``[K, N, R, D]`` with ``R``
query heads to each of ``K`` key heads. Each has its equal in plain torch in the parity tests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.native.compiled import TYPES, kernel, kernels


def norm_forward(
    hidden: Float[Tensor, "N E"],
    update: Float[Tensor, "N E"] | None,
    *,
    weight: Float[Tensor, "E"],
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "N E"], Float[Tensor, "N E"], Float[Tensor, "N"]]:
    """``hidden + update``, its RMS norm in ``dtype``, and the norm's factors.

    (arXiv:1910.07467, eq. 4.) Without an update the first result is ``hidden`` itself.
    """
    rows, width = hidden.shape
    total = hidden if update is None else torch.empty_like(hidden)
    out = torch.empty_like(hidden, dtype=dtype)
    scale = hidden.new_empty(rows)
    assert weight.shape == (width,), "a weight for every number"
    assert update is None or update.shape == hidden.shape
    given = [hidden, update, weight, total, out, scale]
    _check(given, wide=(hidden, weight), narrow=(update,), dtype=dtype)
    _call("norm_forward", dtype, "iif", (rows, width, epsilon), given)
    return total, out, scale


def norm_backward(
    hidden: Float[Tensor, "N E"],
    weight: Float[Tensor, "E"],
    *,
    scale: Float[Tensor, "N"],
    grad: Float[Tensor, "N E"],
    carry: Float[Tensor, "N E"],
) -> tuple[Float[Tensor, "N E"], Float[Tensor, "N E"], Float[Tensor, "N E"], Float[Tensor, "E"]]:
    """Gradients of ``hidden`` (float32, and in the type of ``grad``) and of ``weight``.

    With r the factor and x the hidden state, d out_j / d x_i = w_j r (1[i = j] - x_i x_j r^2 / E).

    Args:
        hidden: what was normalised.
        weight: of the norm.
        scale: its factors.
        grad: of the norm's output.
        carry: what reaches ``hidden`` past the norm; added to its gradient.

    Returns:
        The gradient twice, the norm's output once more (third), the weight's gradient.
    """
    rows, width = hidden.shape
    total, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)
    narrow, again = (torch.empty_like(grad) for _ in range(2))
    assert weight.shape == (width,), "a weight for every number"
    assert scale.shape == (rows,), "a factor for every row"
    assert grad.shape == carry.shape == hidden.shape
    given = [hidden, weight, scale, grad, carry, total, narrow, again, weight_grad]
    _check(given, wide=(hidden, weight, scale, carry), narrow=(grad,), dtype=grad.dtype)
    _call("norm_backward", grad.dtype, "ii", (rows, width), given, result=ctypes.c_int64)
    return total, narrow, again, weight_grad


def swiglu_backward(
    gate_up: Float[Tensor, "N J"], grad: Float[Tensor, "N I"]
) -> tuple[Float[Tensor, "N J"], Float[Tensor, "N I"]]:
    """Gradient of ``gate_up = [gate, up]``, and ``silu(gate) * up`` once more."""
    rows, width = grad.shape
    gradient, again = torch.empty_like(gate_up), torch.empty_like(grad)
    assert gate_up.shape == (rows, 2 * width), "gates and what they open, side by side"
    given = [gate_up, grad, gradient, again]
    _check(given, wide=(), narrow=(gate_up, grad), dtype=grad.dtype)
    _call("swiglu_backward", grad.dtype, "ii", (rows, width), given)
    return gradient, again


def split_heads(
    packed: Float[Tensor, "N X"],
    cosine: Float[Tensor, "N D"],
    sine: Float[Tensor, "N D"],
    *,
    key_heads: int,
) -> tuple[Float[Tensor, "K N R D"], Float[Tensor, "K N D"], Float[Tensor, "K N D"]]:
    """Rotated queries and keys, and values, of rows that hold them side by side.

    (arXiv:2104.09864, eq. 34; both halves of ``cosine`` and ``sine``.)
    """
    rows, width = cosine.shape
    repeats = packed.shape[1] // (key_heads * width) - 2
    assert packed.shape == (rows, key_heads * (repeats + 2) * width), "whole heads"
    assert sine.shape == cosine.shape
    query = packed.new_empty(key_heads, rows, repeats, width)
    key, value = (packed.new_empty(key_heads, rows, width) for _ in range(2))
    given = [packed, cosine, sine, query, key, value]
    _check(given, wide=(cosine, sine), narrow=(packed,), dtype=packed.dtype)
    _call("split_heads", packed.dtype, "iiii", (rows, key_heads, repeats, width), given)
    return query, key, value


def join_heads(
    query: Float[Tensor, "K N R D"],
    key: Float[Tensor, "K N D"],
    value: Float[Tensor, "K N D"],
    cosine: Float[Tensor, "N D"],
    sine: Float[Tensor, "N D"],
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "N X"]:
    """Gradient of what ``split_heads`` took, in ``dtype``, from those of its results."""
    key_heads, rows, repeats, width = query.shape
    assert key.shape == value.shape == (key_heads, rows, width)
    assert cosine.shape == sine.shape == (rows, width)
    packed = query.new_empty(rows, key_heads * (repeats + 2) * width, dtype=dtype)
    given = [query, key, value, cosine, sine, packed]
    _check(given, wide=tuple(given[:-1]), narrow=(), dtype=dtype)
    _call("join_heads", dtype, "iiii", (rows, key_heads, repeats, width), given)
    return packed


def can_add(total: Tensor, part: Tensor) -> bool:
    """Whether ``add_`` takes these two."""
    return (
        type(total) is type(part) is Tensor  # of others' memory nothing is known
        and total.device.type == part.device.type == "cpu"
        and total.dtype == torch.float32
        and part.dtype in TYPES
        and total.shape == part.shape
        and total.is_contiguous()
        and part.is_contiguous()
        and kernels() is not None
    )


def add_(total: Float[Tensor, "*shape"], part: Float[Tensor, "*shape"]) -> None:
    """``total += part`` in one pass; for what ``can_add``."""
    kernel(f"add_{TYPES[part.dtype]}", "ipp")(total.numel(), total.data_ptr(), part.data_ptr())


def _check(
    every: Sequence[Tensor | None],
    *,
    wide: tuple[Tensor, ...],
    narrow: tuple[Tensor | None, ...],
    dtype: torch.dtype,
) -> None:
    assert all(tensor is None or tensor.is_contiguous() for tensor in every), "buffers are whole"
    assert all(tensor.dtype == torch.float32 for tensor in wide), "these are float32"
    assert all(tensor is None or tensor.dtype == dtype for tensor in narrow), "as the products"


def _call(
    name: str,
    dtype: torch.dtype,
    kinds: str,
    numbers: tuple[int | float, ...],
    tensors: Sequence[Tensor | None],
    result: type[ctypes.c_int64] | None = None,
) -> None:
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    kernel(f"{name}_{TYPES[dtype]}", kinds + "p" * len(tensors), result)(*numbers, *pointers)
