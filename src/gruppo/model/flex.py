"""Attention over packed groups by FlexAttention (arXiv:2412.05496), for training on CUDA.

The two calls per group of ``packing.py`` need a mask each, which rules flash kernels out. Here one
compiled kernel computes the whole packed row, and skips blocks in which no token sees another.
Every kind of layer is compared with the calls per group once, in value and gradient; where that
or a later call fails, they remain (but memory that runs out is the caller's business). Attention
sinks are not done here.

The compiled kernel has been run on no GPU yet; what it is told (masks and scores), and what becomes
of a kernel that is wrong, is tested.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gruppo.memory import is_out_of_memory
from gruppo.model.packing import Kernel, Packing, pack, packed_attention

_log: Final = logging.getLogger(__name__)
_TOLERANCE: Final = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # TF32 too

_Heads = tuple[int, int, int, int]  # of queries and of keys; widths of keys and of values
_Rule = tuple[int | None, float | None, float | None]  # window, soft cap, scaling
_Kind = tuple[torch.device, torch.dtype, _Heads, _Rule]
_Qkv = tuple[Tensor, Tensor, Tensor]  # query, key and value
Flex = Callable[..., Tensor]
"""(query, key, value, packing, window=, softcap=, scaling=): as ``flex_attention``."""

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


@final
class Trials:
    """Calls a function like ``flex_attention`` for layers whose results it was seen to match.

    Each kind of layer is tried once: device, type, heads and rule. A kind that failed or differed
    is not tried again; running out of memory says nothing of a kind, and is passed on.
    """

    def __init__(self, flex: Flex) -> None:
        self._flex = flex
        self._trusted: dict[_Kind, bool] = {}

    def attend(
        self, qkv: _Qkv, packing: Packing, kernel: Kernel, rule: _Rule
    ) -> Float[Tensor, "1 N H E"] | None:
        """What ``kernel`` computes group by group; None for a kind of layer that is not trusted.

        Args:
            qkv: Query, key and value; under autocast they may be of several types, as transformers
                leaves them (rotated ones are float32).
            packing: The row's layout.
            kernel: What it is compared with.
            rule: Sliding window, soft cap and scaling.
        """
        query, key, value = _cast(qkv)
        if len({query.dtype, key.dtype, value.dtype}) > 1:
            return None
        heads = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        kind = (query.device, query.dtype, heads, rule)
        if kind not in self._trusted:
            self._trusted[kind] = self._is_right(kind, kernel)
        if not self._trusted[kind]:
            return None
        try:
            return self._call((query, key, value), packing, rule)
        except Exception as failure:  # as in a trial, for a row that is compiled anew
            _refuse(failure)
            self._trusted[kind] = False
            return None

    def _is_right(self, kind: _Kind, kernel: Kernel) -> bool:
        """Whether values and gradients of a small packed row are those of ``kernel``."""
        try:
            error = self._difference(kind, kernel)
        except Exception as failure:  # whatever a compiler, or its absence, makes of it
            _refuse(failure)
            return False
        if not error <= _TOLERANCE.get(kind[1], 1e-6):  # nor NaN
            _log.warning("training without FlexAttention: it differs by %.1e", error)
            return False
        return True

    def _difference(self, kind: _Kind, kernel: Kernel) -> float:
        """Largest difference of values and gradients, relative to the largest of them.

        The first call may come from within a checkpointed layer, which counts what is saved for the
        backward pass: hooks of its own keep the trial out of that.
        """
        device, _, _, rule = kind
        packing, parts, weight = _small_row(kind)
        with (
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.autograd.graph.saved_tensors_hooks(torch.detach, lambda kept: kept),
        ):
            query, key, value = parts
            theirs = packed_attention(query, key, value, packing.groups, kernel, window=rule[0])
            ours = self._call((query, key, value), packing, rule)
            left, right = (
                [out.detach(), *torch.autograd.grad((weight * out).sum(), parts)]
                for out in (ours, theirs)
            )
        tiny = torch.finfo(torch.float32).tiny
        errors = [
            (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(tiny)
            for a, b in zip(left, right, strict=True)
        ]
        return torch.stack(errors).max().item()  # Python's max may lose a NaN

    def _call(self, qkv: _Qkv, packing: Packing, rule: _Rule) -> Tensor:
        query, key, value = qkv
        window, softcap, scaling = rule
        with torch.autocast(query.device.type, enabled=False):  # in a trial and outside alike
            return self._flex(
                query, key, value, packing, window=window, softcap=softcap, scaling=scaling
            )


_trials: Final = Trials(flex_attention)


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

    None on other devices than CUDA, for mixed types outside autocast (which casts all to its own,
    as for torch's own attention), and where a small trial, or a call, failed or differed.
    """
    if not query.is_cuda:
        return None
    return _trials.attend((query, key, value), packing, kernel, (window, softcap, scaling))


def _cast(qkv: _Qkv) -> _Qkv:
    """As autocast does for torch's own attention."""
    query, key, value = qkv
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return qkv
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _refuse(failure: Exception) -> None:
    """Say why a kind of layer is refused; raise what is no fault of FlexAttention."""
    # a checkpoint ends its second forward pass by an exception, as soon as it has what it needs
    if is_out_of_memory(failure) or type(failure).__module__ == checkpoint.__module__:
        raise failure
    reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    _log.warning("training without FlexAttention: %s", reason)


def _small_row(kind: _Kind) -> tuple[Packing, list[Tensor], Tensor]:
    """A packed row of two groups; its query, key and value; and weights of its outputs."""
    device, dtype, (num_queries, num_keys, width, value_width), _ = kind
    tokens = torch.zeros(4, 90, dtype=torch.long)
    packing = pack([(1,) * 70] * 3 + [(2, 3)], tokens, [90, 3, 41, 60], device=device)
    generator = torch.Generator().manual_seed(0)
    length = len(packing.ids)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(device, dtype)

    shapes = ((num_queries, width), (num_keys, width), (num_keys, value_width))
    parts = [drawn(count, length, size).requires_grad_() for count, size in shapes]
    return packing, parts, drawn(length, num_queries, value_width)


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
