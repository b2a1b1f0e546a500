"""Attention over segments of one row without copies of keys: parts merged by their log-sum-exps.

The row's attention is cut into rectangles: some queries over some keys. Softmax over several
rectangles is theirs weighted by their shares of the sum (arXiv:2205.14135, section 3.1), and the
gradient of a rectangle needs the merged log-sum-exp and output only. So nothing is repeated,
gathered or padded, and autograd keeps queries, keys, values and the output once. A rectangle is a
few products of matrices with a compiled softmax between them (``rectangle.py``), or a call of
torch's flash kernel where there is no compiler. For CPUs, and plain softmax attention alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from gruppo.model.rectangle import Gradients, Way, by_key_head, way_of
from gruppo.native import can_score

BLOCK_SCORES: Final = 2**23
"""Scores of one rectangle, 32 MiB of them in float32, if that leaves it enough queries."""
_LEAST_QUERIES: Final = 128  # fewer make products too small to be fast, however many keys there are


@dataclass(frozen=True, slots=True)
class Part:
    """Queries at positions ``query`` over keys at ``key``.

    The last query sees all keys and each one before it one less (``causal``), or all see all.
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
    with torch.autocast("cpu", enabled=False):  # types are chosen here, product by product
        return _Merged.apply(query, key, value, cut(parts, query), scaling)


def cut(parts: Sequence[Part], query: Float[Tensor, "1 H N D"]) -> tuple[Part, ...]:
    """``parts`` by blocks of queries; torch's kernel cuts for itself."""
    if not can_score(query):
        return tuple(parts)
    return tuple(block for part in parts for block in blocks(part, heads=query.shape[1]))


def attend(way: Way, parts: Sequence[Part], out: Float[Tensor, "K N R D"]) -> Tensor:
    """Write the attention of all queries to ``out``; returns log-sum-exps [K, N, R]."""
    wide = torch.promote_types(out.dtype, torch.float32)
    lse = out.new_full(out.shape[:3], -torch.inf, dtype=wide)
    for part in parts:
        here = part.query
        mixed, sums = way.attend(here, part.key, causal=part.causal)
        if part.causal:
            out[:, here], lse[:, here] = mixed, sums
        else:
            _merge(out[:, here], lse[:, here], mixed, sums)
    return lse


def attend_backward(
    way: Way,
    parts: Sequence[Part],
    given: Float[Tensor, "K N R D"],
    *,
    out: Float[Tensor, "K N R D"],
    lse: Float[Tensor, "K N R"],
) -> Gradients:
    """Gradients of queries, keys and values, from that ``given`` of ``out``."""
    sums = Gradients.zeros(out)
    back = way.backward(given, out, lse)
    for part in parts:
        back(part.query, part.key, sums, causal=part.causal)
    return sums


def blocks(part: Part, *, heads: int) -> Iterator[Part]:
    """``part`` by some queries at a time, so that its scores do not grow as their square."""
    width = part.key.stop - part.key.start
    size = max(_LEAST_QUERIES, BLOCK_SCORES // (heads * width))
    for start in range(part.query.start, part.query.stop, size):
        stop = min(start + size, part.query.stop)
        unseen = part.query.stop - stop if part.causal else 0
        yield Part(slice(start, stop), slice(part.key.start, part.key.stop - unseen), part.causal)


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
        way = way_of(query, key, value, scaling)
        lse = attend(way, parts, by_key_head(out.transpose(1, 2), key))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.scaling = parts, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        query, key, value, out, lse = ctx.saved_tensors
        merged, given = (
            by_key_head(tensor.transpose(1, 2), key) for tensor in (out, grad_outputs[0])
        )
        way = way_of(query, key, value, ctx.scaling)
        with torch.autocast("cpu", enabled=False):  # whoever calls backward within it
            sums = attend_backward(way, ctx.parts, given, out=merged, lse=lse)
        return *sums.like(query, key), None, None


def _merge(out: Tensor, lse: Tensor, mixed: Tensor, sums: Tensor) -> None:
    """Add keys of another part: both outputs weighted by their shares; in place."""
    whole = torch.logaddexp(lse, sums)
    share, other = ((x - whole).exp_()[..., None] for x in (lse, sums))
    out.copy_(out * share + mixed * other)
    lse.copy_(whole)
