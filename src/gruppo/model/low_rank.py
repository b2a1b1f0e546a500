"""Adapters of layers that read the same rows, in few products: what they add, and its gradients.

An adapter adds s B A to a layer's matrix (LoRA, arXiv:2106.09685, section 4.1). Where layers read
the same rows, their adapters are two matrices together: all A below each other, and every s B in
its own rows and columns of a matrix that is 0 elsewhere. That costs less than one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gruppo import native
from gruppo.model.adapter import LowRank
from gruppo.model.joint import Joint, give_products


@final
class LowRanks:
    """What the adapters of some layers add to the layers' results [N, O], which lie side by side.

    Args:
        adapters: of each layer; None for one without an adapter.
        sizes: how many results each layer has; their sum is O.
        dtype: of products.
    """

    def __init__(
        self, adapters: Sequence[LowRank | None], sizes: Sequence[int], dtype: torch.dtype
    ) -> None:
        assert len(adapters) == len(sizes), "one for every layer"
        self._present = [one for one in adapters if one is not None]
        self._results: list[slice] = []  # of each present one, among all layers'
        self._ranks: list[slice] = []  # and its place among all ranks
        start = rank = 0
        for one, size in zip(adapters, sizes, strict=True):
            if one is not None:
                self._results.append(slice(start, start + size))
                self._ranks.append(slice(rank, rank := rank + len(one.down)))
            start += size
        self._down = Joint([one.down for one in self._present], dtype)
        self._scaled = self._blocks(start, rank)
        self._up = Joint([self._scaled], dtype)
        self._dtype = dtype
        self._inner: Tensor | None = None

    def forward(self, rows: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        """What is added for ``rows``; both are in the products' type."""
        return self._up.forward(self._down.forward(rows))

    def cut(self) -> tuple[native.Panels, native.Panels]:
        """What the own kernels multiply by in place of ``forward``; an even number of ranks."""
        down, up = [one.down.detach() for one in self._present], self._scaled
        odd = up.shape[1] % 2  # numbers are read in pairs
        down += [torch.zeros_like(down[0][:odd])] * odd
        up = nn.functional.pad(up, (0, odd))
        return native.cut_columns(down, self._dtype), native.cut_columns([up], self._dtype)

    def backward(self, grad: Float[Tensor, "N O"]) -> Float[Tensor, "N I"]:
        """What they add to the gradient of the rows, from that of the results."""
        self._inner = self._up.backward(grad)
        return self._down.backward(self._inner)

    def gradients(
        self,
        grad: Float[Tensor, "N O"],
        rows: Float[Tensor, "N I"],
        wanted: Sequence[tuple[bool, bool]],
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Those of A and B of every adapter, as ``give_products`` gives them.

        Args:
            grad: what ``backward`` was called with before.
            rows: what ``forward`` took.
            wanted: whether A and B want one, for every adapter.
        """
        assert self._inner is not None, "after backward"
        downs = give_products(
            [one.down for one in self._present],
            [of_down for of_down, _ in wanted],
            grad=self._inner,
            rows=rows,
        )
        low = self._down.forward(rows)
        ups = [
            give_products([one.up], [of_up], grad=grad[:, part], rows=low[:, rank] * one.scale)[0]
            for one, (_, of_up), part, rank in zip(
                self._present, wanted, self._results, self._ranks, strict=True
            )
        ]
        return list(zip(downs, ups, strict=True))

    def _blocks(self, results: int, ranks: int) -> Float[Tensor, "O R"]:
        blocks = self._present[0].up.new_zeros(results, ranks, dtype=torch.float32)
        for one, part, rank in zip(self._present, self._results, self._ranks, strict=True):
            torch.mul(one.up.detach(), one.scale, out=blocks[part, rank])
        return blocks
