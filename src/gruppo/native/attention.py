"""Attention of one new token a row over a shared prompt and the row's own tokens."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.native.compiled import kernel, kernels

_NAMES = {
    torch.float32: "decode_attention_float32",
    torch.bfloat16: "decode_attention_bfloat16",
}


def can_attend(query: Tensor) -> bool:
    """Whether ``decode_attention`` can take such queries here."""
    is_taken = query.device.type == "cpu" and query.dtype in _NAMES and query.shape[-1] % 2 == 0
    return is_taken and kernels() is not None


def decode_attention(  # noqa: PLR0913 - eight tensors, each one thing
    query: Float[Tensor, "N H D"],
    prompt_keys: Float[Tensor, "P K W D"],
    prompt_values: Float[Tensor, "P K W D"],
    own_keys: Float[Tensor, "S K C D"],
    own_values: Float[Tensor, "S K C D"],
    *,
    place: Int[Tensor, "N"],
    prompt_length: Int[Tensor, "N"],
    own_length: Int[Tensor, "N"],
    scaling: float,
    window: int | None = None,
) -> Float[Tensor, "N H D"]:
    """Softmax attention of row ``n`` over prompt ``place[n]`` and its own tokens.

    It sees the first ``prompt_length[n]`` keys of the prompt and ``own_length[n] + 1`` of its own
    (the last is that of the query's token); of these the last ``window``. Only for what
    ``can_attend``. Products and sums are in float32. A row's result does not depend on the others.
    """
    rows, heads, width = query.shape
    key_heads = prompt_keys.shape[1]
    query = query.contiguous()
    out = torch.empty_like(query)
    floats = (query, prompt_keys, prompt_values, own_keys, own_values)
    indices = (place, prompt_length, own_length)
    tensors = (*floats, *indices, out)
    assert all(tensor.is_contiguous() for tensor in tensors), "buffers are whole"
    assert all(tensor.dtype == query.dtype for tensor in floats), "one type of numbers"
    assert all(tensor.dtype == torch.int64 for tensor in indices), "indices are int64"
    assert width % 2 == 0, "halves of a head are rotated"
    kernel(_NAMES[query.dtype], "iiiiiiifppppppppp", ctypes.c_int64)(
        *(rows, key_heads, heads // key_heads, width),
        *(prompt_keys.shape[2], own_keys.shape[2], window or 0, scaling),
        *(tensor.data_ptr() for tensor in tensors),
    )
    return out
