"""Copies of weights as products take them: joined, in the products' type, kept from pass to pass.

An optimizer step has several passes over the same weights. Their copies are alive at the peak of
each that is followed by a backward pass anyway, so keeping them in between costs no memory and
saves making them anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class Casts:
    """Copies of the weights that it was asked for, until ``clear``."""

    def __init__(self) -> None:
        """Nothing yet."""
        # with the weights, so that an id is not given to another one, and their versions
        self._made: dict[tuple[int, ...], tuple[list[Tensor], list[int], Tensor]] = {}

    def of(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """``weights`` below each other in ``dtype``; a single one of that type is itself given.

        Made anew if one was changed in place, or has other memory. Changes within the memory of
        ``weight.data`` are not seen: ``clear`` after these.
        """
        key = tuple(map(id, weights))
        versions = [mark for weight in weights for mark in (weight._version, weight.data_ptr())]
        _, known, matrix = self._made.get(key, (None, None, None))
        if matrix is None or known != versions or matrix.dtype != dtype:
            matrix = joined(weights, dtype)
            if matrix.data_ptr() != weights[0].data_ptr():
                self._made[key] = (list(weights), versions, matrix)
        return matrix

    def clear(self) -> None:
        """Forget all: the weights are about to change, or the memory is wanted."""
        self._made.clear()


def joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "O I"]:
    """``weights`` below each other in ``dtype``: a copy, unless it is one as it is."""
    plain = [weight.detach() for weight in weights]
    if len(plain) == 1:
        return plain[0].to(dtype)
    matrix = plain[0].new_empty(sum(map(len, plain)), plain[0].shape[1], dtype=dtype)
    for part, weight in zip(matrix.split([len(w) for w in plain]), plain, strict=True):
        part.copy_(weight)
    return matrix
