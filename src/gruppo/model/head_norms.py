"""Norms of queries and keys, each head by itself, in a training pass (as Qwen 3 has them)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo import native
from gruppo.model.decoder import Layer


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms over the numbers of a head (arXiv:2505.09388, section 2).

    ``sizes`` are the widths of all queries, keys and values, ``epsilons`` and ``places`` those of
    the norms of queries and keys, and where their weights stand among a layer's parameters.
    """

    sizes: tuple[int, ...]
    epsilons: tuple[float, float]
    places: tuple[int, int]

    @classmethod
    def of(cls, layer: Layer) -> HeadNorms | None:
        """Those of ``layer``; None if it has none."""
        query, key = layer.head_norms
        if query is None or key is None:
            return None
        place = {id(parameter): at for at, parameter in enumerate(layer.parameters())}
        return cls(
            sizes=tuple(linear.out_features for linear in layer.query_key_value),
            epsilons=(query.epsilon, key.epsilon),
            places=(place[id(query.weight)], place[id(key.weight)]),
        )

    def forward(
        self, packed: Float[Tensor, "N X"], parameters: Sequence[Tensor]
    ) -> Float[Tensor, "N X"]:
        """Queries, keys and values side by side, the first two normed."""
        *_, value = packed.split(self.sizes, 1)
        normed = [part.normed.view(len(packed), -1) for part in self._parts(packed, parameters)]
        return torch.cat([*normed, value], 1)

    def backward(
        self,
        packed: Float[Tensor, "N X"],
        grad: Float[Tensor, "N X"],
        parameters: Sequence[Tensor],
    ) -> tuple[Float[Tensor, "N X"], dict[int, Float[Tensor, "D"]]]:
        """Gradients of ``packed``, and of the weights by their places.

        Args:
            packed: what ``forward`` took.
            grad: of what it gave.
            parameters: the layer's.
        """
        *grads, of_value = grad.split(self.sizes, 1)
        made, of_weights = [], {}
        for part, given, place in zip(
            self._parts(packed, parameters), grads, self.places, strict=True
        ):
            _, narrow, _, of_weights[place] = native.norm_backward(
                part.heads,
                part.weight,
                scale=part.scale,
                grad=given.reshape(part.heads.shape).contiguous(),
                carry=torch.zeros_like(part.heads),
            )
            made.append(narrow.view(len(packed), -1))
        return torch.cat([*made, of_value], 1), of_weights

    def _parts(self, packed: Tensor, parameters: Sequence[Tensor]) -> Iterator[_Part]:
        """Of queries and of keys."""
        query, key, _ = packed.split(self.sizes, 1)
        for part, place, epsilon in zip((query, key), self.places, self.epsilons, strict=True):
            weight = parameters[place].detach()
            heads = part.float().reshape(-1, len(weight)).contiguous()  # a single head is a view
            _, normed, scale = native.norm_forward(
                heads, None, weight=weight, epsilon=epsilon, dtype=packed.dtype
            )
            yield _Part(heads, weight, normed, scale)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """All queries' heads or all keys', one below the other."""

    heads: Float[Tensor, "M D"]
    weight: Float[Tensor, "D"]
    normed: Float[Tensor, "M D"]
    scale: Float[Tensor, "M"]
