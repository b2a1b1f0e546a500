"""Attention over packed groups by FlexAttention (arXiv:2412.05496), for training on CUDA.

The two calls per group of ``packing.py`` need a mask each, which rules flash kernels out. Here one
compiled kernel computes the whole packed row, and skips blocks in which no token sees another.
Whatever goes wrong on the way, the calls per group remain: every kind of layer is compared with
them once, in value and gradient. Attention sinks are not done here.

The compiled kernel has been run on no GPU yet; what it is told (masks and scores) is tested.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.model.packing import Kernel, Packing, pack, packed_attention

_log: Final = logging.getLogger(__name__)
_TOLERANCE: Final = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # TF32 too

_Heads = tuple[int, int, int, int]  # of queries and of keys; widths of keys and of values
_Rule = tuple[int | None, float | None, float | None]  # window, soft cap, scaling
_trusted: Final[dict[tuple[torch.device, torch.dtype, _Heads, _Rule], bool]] = {}  # once tried

Seen = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key): whether the token at one place of the row sees that at the other."""


def seen(packing: Packing, window: int | None) -> Seen:
    """Which token of a packed row sees which: its prompt and its own completion, up to itself."""
    group, own = _owners(packing)
    positions = packing.positions

    reach = len(positions) if window is None else window  # positions are below it
    # An expression, because torch looks at the function itself: how many arguments it takes (which
    # one that a test wraps does not show), and what it does.
    return lambda batch, head, query, key: (
        ((own[key] == 0) | (own[key] == own[query]))
        & (group[query] == group[key])
        & (positions[key] <= positions[query])
        & (positions[query] - positions[key] < reach)
    )


def capped(softcap: float | None) -> Callable[..., Tensor] | None:
    """The soft cap (arXiv:2408.00118, section 2) of a score; None if there is none."""
    if softcap is None:
        return None

    return lambda value, batch, head, query, key: torch.tanh(value / softcap) * softcap


def flex_attention(  # noqa: PLR0913 - three tensors, and four ways to attend
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N E"],
    packing: Packing,
    *,
    window: int | None,
    softcap: float | None,
    scaling: float | None,
    is_compiled: bool = True,
) -> Float[Tensor, "1 N H E"]:
    """Attention over a packed row in one call; a block mask is made once per row and window."""
    attend, make = _compiled() if is_compiled else _plain()
    if window not in packing.masks:
        length = len(packing.ids)
        packing.masks[window] = make(
            seen(packing, window), None, None, length, length, device=query.device
        )
    mixed = attend(
        query,
        key,
        value,
        score_mod=capped(softcap),
        block_mask=packing.masks[window],
        scale=scaling,
        enable_gqa=True,
    )
    return mixed.transpose(1, 2)


def try_flex(  # noqa: PLR0913 - as flex_attention
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N E"],
    packing: Packing,
    kernel: Kernel,
    *,
    window: int | None,
    softcap: float | None,
    scaling: float | None,
) -> Float[Tensor, "1 N H E"] | None:
    """``flex_attention`` where it is known to compute what ``kernel`` does, group by group.

    None on other devices than CUDA, for mixed types, and where a small trial failed or differed.
    """
    if not query.is_cuda or len({query.dtype, key.dtype, value.dtype}) > 1:
        return None
    heads = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    rule = (window, softcap, scaling)
    kind = (query.device, query.dtype, heads, rule)
    if kind not in _trusted:
        _trusted[kind] = _is_right(*kind, kernel)
    if not _trusted[kind]:
        return None
    return flex_attention(
        query, key, value, packing, window=window, softcap=softcap, scaling=scaling
    )


def _is_right(
    device: torch.device, dtype: torch.dtype, heads: _Heads, rule: _Rule, kernel: Kernel
) -> bool:
    """Whether values and gradients of a small packed row are those of ``kernel``."""
    try:
        error = _difference(device, dtype, heads, rule, kernel)
    except Exception as failure:  # whatever a compiler, or its absence, makes of it
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        _log.warning("training without FlexAttention: %s", reason)
        return False
    if error > _TOLERANCE.get(dtype, 1e-6):
        _log.warning("training without FlexAttention: it differs by %.1e", error)
        return False
    return True


@torch.enable_grad()
def _difference(
    device: torch.device, dtype: torch.dtype, heads: _Heads, rule: _Rule, kernel: Kernel
) -> float:
    """Largest difference of values and gradients, relative to the largest of them."""
    window, softcap, scaling = rule
    tokens = torch.zeros(4, 90, dtype=torch.long)
    packing = pack([(1,) * 70] * 3 + [(2, 3)], tokens, [90, 3, 41, 60], device=device)
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads[0], heads[2]), (heads[1], heads[2]), (heads[1], heads[3]))
    parts = [
        torch.randn(1, count, len(packing.ids), width, generator=generator)
        .to(device, dtype)
        .requires_grad_()
        for count, width in shapes
    ]
    query, key, value = parts
    ours = flex_attention(
        query, key, value, packing, window=window, softcap=softcap, scaling=scaling
    )
    theirs = packed_attention(query, key, value, packing.groups, kernel, window=window)
    weight = torch.randn(ours.shape, generator=generator).to(device, dtype)
    left, right = (
        [out.detach(), *torch.autograd.grad((weight * out).sum(), parts)] for out in (ours, theirs)
    )
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(left, right, strict=True)
    )


def _owners(packing: Packing) -> tuple[Tensor, Tensor]:
    """For every token of the row: its group, and its completion (from 1; 0 for a prompt's)."""
    group = torch.zeros_like(packing.positions)
    own = torch.zeros_like(packing.positions)
    before = 0
    for number, part in enumerate(packing.groups):
        group[part.start : part.stop] = number
        rows = torch.arange(len(part.index), device=own.device)[:, None].expand_as(part.index)
        at = part.index.flatten()[part.filled]
        group[at] = number
        own[at] = rows.flatten()[part.filled] + before + 1
        before += len(part.index)
    return group, own


def _plain() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as attend

    return attend, create_block_mask


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    attend, make = _plain()
    return torch.compile(attend, dynamic=True), torch.compile(make, dynamic=True)
