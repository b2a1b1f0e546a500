"""Attention over segments of one row without copies of keys, as one node of autograd.

Nothing is repeated, gathered or padded, and autograd keeps queries, keys, values and the output
once. A compiled kernel does all of it, and another its gradient (``native/segments_forward.cpp``,
``segments_backward.cpp``), or, where there is no compiler, torch's flash kernel part by part
(``rectangle.py``). For CPUs, and plain softmax attention alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from gruppo import native
from gruppo.model.rectangle import Gradients, Part, Rectangles


@dataclass(frozen=True, slots=True)
class Segments:
    """Attention over ``parts`` by own kernels; each tensor is whole."""

    query: Float[Tensor, "K N R D"]
    key: Float[Tensor, "K N D"]
    value: Float[Tensor, "K N D"]
    pattern: native.Pattern

    def attend(self, out: Float[Tensor, "N H D"]) -> Float[Tensor, "K N R"]:
        """Write the attention of all queries to ``out``; returns log-sum-exps."""
        return native.attend_parts(self.query, self.key, self.value, self.pattern, out=out)

    def backward(
        self, grad: Float[Tensor, "N H D"], *, out: Float[Tensor, "N H D"], lse: Tensor
    ) -> Gradients:
        """Gradients from ``grad``, that of the output ``out``."""
        found = native.attend_parts_backward(
            self.query, self.key, self.value, self.pattern, out=out, lse=lse, grad=grad
        )
        return Gradients(*found)


def part_numbers(parts: Sequence[Part]) -> tuple[native.PartNumbers, ...]:
    """As the kernels take them."""
    return tuple(
        (part.query.start, part.query.stop, part.key.start, part.key.stop, part.causal)
        for part in parts
    )


def can_merge(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`merged_attention` takes such tensors."""
    dense = all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and dense


def merged_attention(
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N D"],
    parts: Sequence[Part],
    *,
    scaling: float | None = None,
) -> Float[Tensor, "1 N H D"]:
    """Softmax attention of each query over all keys that a part gives it.

    Args:
        query: H heads.
        key: K heads, H / K query heads to each.
        value: Like ``key``.
        parts: Every query is in one causal part; others come after that and add keys.
        scaling: Multiplies scores; None: 1 / sqrt(D).
    """
    if torch.is_autocast_enabled("cpu"):  # as torch does for its own attention
        kind = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    with torch.autocast("cpu", enabled=False):  # types are chosen here, product by product
        return _Merged.apply(query, key, value, tuple(parts), scaling)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        parts: tuple[Part, ...],
        scaling: float | None,
    ) -> Tensor:
        _, heads, length, width = query.shape
        out = query.new_empty(1, length, heads, width)
        way = _way(query, key, value, parts, scaling)
        lse = way.attend(out[0] if isinstance(way, Segments) else _by_key_head(out[0], key))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.scaling = parts, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        query, key, value, out, lse = ctx.saved_tensors
        (given,) = grad_outputs
        way = _way(query, key, value, ctx.parts, ctx.scaling)
        with torch.autocast("cpu", enabled=False):  # whoever calls backward within it
            if isinstance(way, Segments):
                sums = way.backward(given[0].contiguous(), out=out[0], lse=lse)
            else:
                merged = _by_key_head(out[0], key)
                sums = way.backward(_by_key_head(given[0], key), merged, lse)
        _, heads, length, width = query.shape
        rows = query.new_empty(length, heads, width)
        _by_key_head(rows, key).copy_(sums.query)
        found = (rows.transpose(0, 1), sums.key.to(key.dtype), sums.value.to(key.dtype))
        return *(gradient[None] for gradient in found), None, None


def _by_key_head(rows: Float[Tensor, "N H D"], key: Tensor) -> Float[Tensor, "K N R D"]:
    """A view of what is ordered by query head; ``key`` [1, K, ...] says how many share one."""
    return rows.unflatten(1, (key.shape[1], -1)).transpose(0, 1)


def _way(
    query: Tensor, key: Tensor, value: Tensor, parts: tuple[Part, ...], scaling: float | None
) -> Segments | Rectangles:
    """How to attend with ``query`` [1, H, N, D], ``key`` and ``value`` [1, K, N, D] here."""
    rows = _by_key_head(query[0].transpose(0, 1), key)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not native.can_attend_parts(query):
        return Rectangles(rows, key[0], value[0], factor, parts)
    pattern = native.Pattern(part_numbers(parts), factor)
    return Segments(rows.contiguous(), key[0].contiguous(), value[0].contiguous(), pattern)
