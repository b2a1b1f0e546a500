"""Attention of some queries over some keys by torch's flash kernel, and its gradient.

A packed row's attention is cut into rectangles. Softmax over several of them is theirs weighted by
their shares of the sum (arXiv:2205.14135, section 3.1), and the gradient of a rectangle needs the
merged log-sum-exp and output only. Tensors are ordered by key head: ``[K, N, R, D]`` with ``R``
query heads to each of ``K`` key heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, slots=True)
class Part:
    """Queries at positions ``query`` over keys at ``key``.

    The last query sees all keys and each one before it one less (``causal``), or all see all.
    """

    query: slice
    key: slice
    causal: bool


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of queries, keys and values, in wide floats."""

    query: Float[Tensor, "K N R D"]
    key: Float[Tensor, "K N D"]
    value: Float[Tensor, "K N D"]

    @classmethod
    def zeros(cls, out: Float[Tensor, "K N R D"]) -> Gradients:
        """Nothing yet, for tensors that gave ``out``."""
        wide = torch.promote_types(out.dtype, torch.float32)
        query = torch.zeros(out.shape, dtype=wide)
        key, value = (torch.zeros_like(query[:, :, 0]) for _ in range(2))
        return cls(query, key, value)


@dataclass(frozen=True, slots=True)
class Rectangles:
    """Attention over ``parts``: every query is in a causal one; others come after it."""

    query: Float[Tensor, "K N R D"]
    key: Float[Tensor, "K N D"]
    value: Float[Tensor, "K N D"]
    scaling: float
    parts: Sequence[Part]

    def attend(self, out: Float[Tensor, "K N R D"]) -> Float[Tensor, "K N R"]:
        """Write the attention of all queries to ``out``; returns log-sum-exps."""
        wide = torch.promote_types(out.dtype, torch.float32)
        lse = out.new_full(out.shape[:3], -torch.inf, dtype=wide)
        for part in self.parts:
            here = part.query
            mixed, sums = _flash(*self._at(part), is_causal=part.causal, scale=self.scaling)
            mixed, sums = mixed.transpose(1, 2), sums.transpose(1, 2)
            if part.causal:
                out[:, here], lse[:, here] = mixed, sums
            else:
                _merge(out[:, here], lse[:, here], mixed, sums)
        return lse

    def backward(self, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Gradients from ``grad``, that of the merged output ``out``; all as queries are."""
        sums = Gradients.zeros(out)
        for part in self.parts:
            here, seen = part.query, part.key
            query, key, value = _flash_backward(
                grad[:, here].transpose(1, 2),
                *self._at(part),
                out[:, here].transpose(1, 2),
                lse[:, here].transpose(1, 2).contiguous(),
                0.0,
                part.causal,
                scale=self.scaling,
            )
            sums.query[:, here] += query.transpose(1, 2)
            sums.key[:, seen] += key.sum(1)
            sums.value[:, seen] += value.sum(1)
        return sums

    def _at(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernel takes: keys and values once for each query head, by a stride of 0."""
        repeats = self.query.shape[2]
        key, value = (
            x[:, None, part.key].expand(-1, repeats, -1, -1) for x in (self.key, self.value)
        )
        return self.query[:, part.query].transpose(1, 2), key, value


def _merge(out: Tensor, lse: Tensor, mixed: Tensor, sums: Tensor) -> None:
    """Add keys of another part: both outputs weighted by their shares; in place."""
    whole = torch.logaddexp(lse, sums)
    share, other = ((x - whole).exp_()[..., None] for x in (lse, sums))
    out.copy_(out * share + mixed * other)
    lse.copy_(whole)
