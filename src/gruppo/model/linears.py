"""Linear layers within a node of autograd: their products, and the gradients of their parameters.

A node takes all parameters of a decoder's layer in one sequence. Here is said where in it those of
its linear layers stand, adapters' included, and what is computed with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gruppo.model.adapter import LowRank
from gruppo.model.casts import Casts
from gruppo.model.decoder import Group
from gruppo.model.gradient import give
from gruppo.model.joint import Joint, give_products
from gruppo.model.low_rank import LowRanks


@dataclass(frozen=True, slots=True)
class _Adapter:
    """Where A and B stand, and what multiplies them."""

    down: int
    up: int
    scale: float


@dataclass(frozen=True, slots=True)
class Linears:
    """Linear layers that read the same rows: where their parameters stand."""

    weights: tuple[int, ...]
    biases: tuple[int | None, ...]
    sizes: tuple[int, ...]
    adapters: tuple[_Adapter | None, ...]

    @classmethod
    def of(
        cls, group: Group, adapters: Mapping[nn.Linear, LowRank], place: Mapping[int, int]
    ) -> Linears:
        """For parameters whose places are known by their ``id``."""
        beside = [adapters.get(layer) for layer in group]
        return cls(
            weights=tuple(place[id(layer.weight)] for layer in group),
            biases=tuple(None if x.bias is None else place[id(x.bias)] for x in group),
            sizes=tuple(layer.out_features for layer in group),
            adapters=tuple(
                None if x is None else _Adapter(place[id(x.down)], place[id(x.up)], x.scale)
                for x in beside
            ),
        )

    def on(self, parameters: Sequence[Tensor], dtype: torch.dtype, casts: Casts | None) -> Matrices:
        """With the parameters themselves, for one pass; see :class:`Matrices`."""
        return Matrices(self, parameters, dtype, casts)


@final
class Matrices:
    """The matrices of some linear layers in one pass; products are in ``dtype``.

    Args:
        linears: where they stand.
        parameters: among these.
        dtype: of rows, products and results.
        casts: keeps what torch multiplies by for the next pass.
    """

    def __init__(
        self,
        linears: Linears,
        parameters: Sequence[Tensor],
        dtype: torch.dtype,
        casts: Casts | None,
    ) -> None:
        self.linears = linears
        self._parameters, self._dtype, self._casts = parameters, dtype, casts
        self._low_ranks: LowRanks | None = None
        if any(linears.adapters):
            adapters = [
                None if at is None else LowRank(parameters[at.down], parameters[at.up], at.scale)
                for at in linears.adapters
            ]
            self._low_ranks = LowRanks(adapters, linears.sizes, dtype)

    def forward(self, rows: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        """All layers' results side by side."""
        made = self._joint().forward(rows, self._bias())
        return made if self._low_ranks is None else made.add_(self._low_ranks.forward(rows))

    def backward(self, grad: Float[Tensor, "N O"]) -> Float[Tensor, "N I"]:
        """The gradient of the rows they took."""
        made = self._joint().backward(grad)
        return made if self._low_ranks is None else made.add_(self._low_ranks.backward(grad))

    def gradients(
        self,
        grad: Float[Tensor, "N O"],
        rows: Float[Tensor, "N I"],
        wanted: Sequence[bool],
    ) -> dict[int, Tensor | None]:
        """Those of the parameters by their places, None where it has been added to ``grad``.

        Args:
            grad: what ``backward`` was called with before.
            rows: what ``forward`` took.
            wanted: whether each parameter wants one.
        """
        found: dict[int, Tensor | None] = {}
        at = self.linears
        if any(wanted[place] for place in at.weights):
            weights = [self._parameters[place] for place in at.weights]
            asked = [wanted[place] for place in at.weights]
            made = give_products(weights, asked, grad=grad, rows=rows)
            found.update(zip(at.weights, made, strict=True))
        if any(place is not None for place in at.biases):
            summed = grad.sum(0, dtype=torch.float32).split(at.sizes)
            for place, part in zip(at.biases, summed, strict=True):
                if place is not None and wanted[place]:
                    found[place] = give(self._parameters[place], part)
        if self._low_ranks is not None:
            present = [adapter for adapter in at.adapters if adapter is not None]
            asked_both = [(wanted[x.down], wanted[x.up]) for x in present]
            pairs = self._low_ranks.gradients(grad, rows, asked_both)
            for adapter, (down, up) in zip(present, pairs, strict=True):
                found[adapter.down], found[adapter.up] = down, up
        return found

    def _joint(self) -> Joint:
        """Anew for every product: what it is cut into goes with it."""
        weights = [self._parameters[place] for place in self.linears.weights]
        return Joint(weights, self._dtype, self._casts)

    def _bias(self) -> Float[Tensor, "O"] | None:
        """The layers' biases side by side, 0 for a layer without one; None if none has one."""
        at, parameters = self.linears, self._parameters
        if all(place is None for place in at.biases):
            return None
        made = parameters[at.weights[0]].new_zeros(sum(at.sizes), dtype=self._dtype)
        for part, place in zip(made.split(at.sizes), at.biases, strict=True):
            if place is not None:
                part.copy_(parameters[place].detach())
        return made
