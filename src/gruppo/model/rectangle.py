"""Attention of some queries over some keys, and its gradient, in two ways of equal precision.

``ByProducts`` makes scores and their gradient in float32 and multiplies weights and values in the
tensors' own type, as torch's flash kernel (``ByFlash``) does; its products of matrices are larger,
which on a CPU makes them several times faster for rectangles of a few hundred tokens. Tensors are
ordered by key head: ``[K, N, R, D]`` with ``R`` query heads to each of ``K`` key heads. Which
rectangles there are, and how they are merged, is the business of ``segments.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.native import Mask, can_score, score_gradient, softmax_scores

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def by_key_head(heads: Float[Tensor, "1 H N D"], key: Tensor) -> Float[Tensor, "K N R D"]:
    """A view of what is ordered by query head; ``key`` [1, K, ...] says how many share one."""
    return heads[0].unflatten(0, (key.shape[1], -1)).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Gradients:
    """Sums over rectangles, in wide floats."""

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

    def like(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ordered and typed as the inputs: [1, H, N, D] and twice [1, K, N, D]."""
        _, heads, length, width = query.shape
        rows = query.new_empty(1, length, heads, width).transpose(1, 2)
        by_key_head(rows, key).copy_(self.query)
        return rows, self.key[None].to(key.dtype), self.value[None].to(key.dtype)


@runtime_checkable
class Back(Protocol):
    """Adds the gradients of one rectangle to ``sums``."""

    def __call__(self, here: slice, seen: slice, sums: Gradients, *, causal: bool) -> None:
        """Queries ``here`` over keys ``seen``."""
        ...


@dataclass(frozen=True, slots=True)
class ByProducts:
    """Compiled scores and softmax, and products of matrices."""

    query: Float[Tensor, "K N R D"]  # contiguous, so that a slice of queries is a matrix
    key: Float[Tensor, "K N D"]  # contiguous, too
    value: Float[Tensor, "K N D"]
    scaling: float

    def attend(self, here: slice, seen: slice, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Attention [K, Q, R, D] of queries ``here`` over keys ``seen``; log-sum-exps [K, Q, R]."""
        query, key = self.query[:, here], self.key[:, seen]
        weights, lse = softmax_scores(query, key, Mask(causal, self.scaling))
        mixed = weights @ self.value[:, seen]
        return mixed.view(query.shape), lse.view(query.shape[:3])

    def backward(self, given: Tensor, out: Tensor, lse: Tensor) -> Back:
        """The gradient of every rectangle, from that of the merged output ``out``."""
        given = given.contiguous()
        delta = (given.float() * out.float()).sum(-1)

        def back(here: slice, seen: slice, sums: Gradients, *, causal: bool) -> None:
            query, key, grad = self.query[:, here], self.key[:, seen], given[:, here]
            weights, gradient = score_gradient(
                query,
                key,
                self.value[:, seen],
                grad,
                mask=Mask(causal, self.scaling),
                lse=lse[:, here],
                delta=delta[:, here],
            )
            sums.query[:, here] += (gradient @ key).view(query.shape)
            sums.key[:, seen] += gradient.mT @ query.flatten(1, 2)
            sums.value[:, seen] += weights.mT @ grad.flatten(1, 2)

        return back


@dataclass(frozen=True, slots=True)
class ByFlash:
    """Torch's own kernel, over views."""

    query: Float[Tensor, "K N R D"]
    key: Float[Tensor, "K N D"]
    value: Float[Tensor, "K N D"]
    scaling: float

    def attend(self, here: slice, seen: slice, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Attention [K, Q, R, D] of queries ``here`` over keys ``seen``; log-sum-exps [K, Q, R]."""
        mixed, lse = _flash(*self._at(here, seen), is_causal=causal, scale=self.scaling)
        return mixed.transpose(1, 2), lse.transpose(1, 2)

    def backward(self, given: Tensor, out: Tensor, lse: Tensor) -> Back:
        """The gradient of every rectangle, from that of the merged output ``out``."""

        def back(here: slice, seen: slice, sums: Gradients, *, causal: bool) -> None:
            found = _flash_backward(
                given[:, here].transpose(1, 2),
                *self._at(here, seen),
                out[:, here].transpose(1, 2),
                lse[:, here].transpose(1, 2).contiguous(),
                0.0,
                causal,
                scale=self.scaling,
            )
            sums.query[:, here] += found[0].transpose(1, 2)
            sums.key[:, seen] += found[1].sum(1)
            sums.value[:, seen] += found[2].sum(1)

        return back

    def _at(self, here: slice, seen: slice) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernel takes: keys and values once for each query head, by a stride of 0."""
        repeats = self.query.shape[2]
        key, value = (x[:, None, seen].expand(-1, repeats, -1, -1) for x in (self.key, self.value))
        return self.query[:, here].transpose(1, 2), key, value


Way = ByProducts | ByFlash


def way_of(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Way:
    """How to attend with ``query`` [1, H, N, D], ``key`` and ``value`` [1, K, N, D] here."""
    rows = by_key_head(query, key)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if can_score(query):
        return ByProducts(rows.contiguous(), key[0].contiguous(), value[0].contiguous(), factor)
    return ByFlash(rows, key[0], value[0], factor)
