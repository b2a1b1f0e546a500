"""Attention over segments of one row without copies of keys: parts merged by their log-sum-exps.

The row's attention is cut into rectangles: some queries over some keys. Softmax over several
rectangles is theirs weighted by their shares of the sum (arXiv:2205.14135, section 3.1), and the
gradient of a rectangle needs the merged log-sum-exp and output only. So every part is one call of
torch's flash kernel over views of the row: nothing is repeated, gathered or padded, and autograd
keeps queries, keys, values and the output once. For CPUs, and plain softmax attention alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, slots=True)
class Part:
    """Queries at positions ``query`` over keys at ``key``.

    Both are the same and each query sees the keys up to its own (``causal``), or it sees all.
    """

    query: slice
    key: slice
    causal: bool


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
        views = _Views.of(query, key, value)
        _, heads, length, width = query.shape
        out = query.new_empty(1, length, heads, width)
        merged = views.split(out.transpose(1, 2)[0])
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_full(merged.shape[:3], -torch.inf, dtype=wide)
        for part in parts:
            here, seen = part.query, part.key
            mixed, sums = _flash(*views.at(here, seen), is_causal=part.causal, scale=scaling)
            if part.causal:
                merged[:, :, here], lse[:, :, here] = mixed, sums
            else:
                _merge(merged[:, :, here], lse[:, :, here], mixed, sums)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.scaling = parts, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        query, key, value, out, lse = ctx.saved_tensors
        views = _Views.of(query, key, value)
        merged = views.split(out.transpose(1, 2)[0])
        given = views.split(grad_outputs[0].transpose(1, 2)[0])
        grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        sums = _Views.of(*grads)
        for part in ctx.parts:
            here, seen = part.query, part.key
            found = _flash_backward(
                given[:, :, here],
                *views.at(here, seen),
                merged[:, :, here],
                lse[:, :, here],
                0.0,
                part.causal,
                scale=ctx.scaling,
            )
            sums.query[:, :, here] += found[0]
            sums.key[:, 0, seen] += found[1].sum(1)
            sums.value[:, 0, seen] += found[2].sum(1)
        return *grads, None, None


def _merge(out: Tensor, lse: Tensor, mixed: Tensor, sums: Tensor) -> None:
    """Add keys of another part: both outputs weighted by their shares; in place."""
    whole = torch.logaddexp(lse, sums)
    share, other = ((x - whole).exp_()[..., None] for x in (lse, sums))
    out.copy_(out * share + mixed * other)
    lse.copy_(whole)


@dataclass(frozen=True, slots=True)
class _Views:
    """Tensors by key head, without copies: query [K, R, N, D], key and value [K, 1, N, D]."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> _Views:
        grouped = query[0].unflatten(0, (key.shape[1], -1))
        return cls(grouped, key[0][:, None], value[0][:, None])

    def split(self, tensor: Tensor) -> Tensor:
        """[H, N, D] like the query."""
        return tensor.unflatten(0, self.query.shape[:2])

    def at(self, here: slice, seen: slice) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernel takes: keys and values once for each query head, by a stride of 0."""
        repeats = self.query.shape[1]
        key, value = (x[:, :, seen].expand(-1, repeats, -1, -1) for x in (self.key, self.value))
        return self.query[:, :, here], key, value
