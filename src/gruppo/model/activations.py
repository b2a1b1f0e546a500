"""What a decoder's products made of tokens as they were drawn, kept for the training pass.

A token that is drawn goes through all layers, and again through the same layers in training: where
the weights have not changed in between, which is so until a step's first update, with the same
results but for rounding. Kept, a training pass needs no product of its own for them on its way
forward, a third of all that it multiplies, and what it trains is the policy that has drawn, but for
what a prompt predicts and for rounding in the head.

Kept by the engine (``engine/local``), token by token, and taken by ``decoder_pass.py``, which looks
completions up by their tokens: on these and on the weights alone depends what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.memory import is_out_of_memory
from gruppo.model.decoder import Decoder
from gruppo.model.packing import Packing

_Key = tuple[tuple[int, ...], tuple[int, ...]]
LayerResults = tuple[Tensor, ...]
"""Results of a layer's joint products, as ``Layer.joints`` orders them: of token t in row t."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Known:
    """What is known of a packed row: ``at`` are its tokens' rows among the layers' ``results``.

    The tokens in ``rest`` are not known; their ``at`` is 0. It holds until ``owner`` forgets.
    """

    results: Sequence[LayerResults]
    at: Int[Tensor, "N"]
    rest: Int[Tensor, "R"]
    owner: Activations
    turn: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the results."""
        return self.results[0][0].dtype

    def fill(self, made: Float[Tensor, "R O"], layer: int, product: int) -> Float[Tensor, "N O"]:
        """Results of one product: those known, and ``made`` for the rest.

        Raises:
            RuntimeError: they were forgotten since, so a backward pass came after an update.
        """
        if self.turn != self.owner.turn:
            raise RuntimeError("activations were forgotten between a pass and its backward pass")
        results = self.results[layer][product].index_select(0, self.at)
        results[self.rest] = made
        return results


@final
class Activations:
    """Results of products for tokens that were drawn since ``open``, until ``clear``.

    Args:
        max_bytes: most memory to keep them in; 0 keeps none. It is taken as tokens are drawn, and
            kept from step to step.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self.turn = 0
        self._is_open = self._is_full = False
        self._used = 0
        self._weights: tuple[float, ...] = ()
        self._results: list[LayerResults] = []
        self._rows: dict[_Key, list[int]] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept now."""
        return self._used

    @property
    def is_open(self) -> bool:
        """Whether what is drawn is kept."""
        return self._is_open

    def open(self) -> None:
        """Forget all, and keep what is drawn from here on."""
        self.clear()
        self._is_open = self.max_bytes > 0

    def clear(self) -> None:
        """Forget all and keep nothing: the weights are about to change."""
        self._forget()
        self._is_open = False

    def rewind(self, num_tokens: int) -> None:
        """Forget what was written after so many tokens, and not added yet."""
        self._used, self._is_full = min(self._used, num_tokens), False

    def layers(
        self, widths: Sequence[Sequence[int]], dtype: torch.dtype, decoder: Decoder
    ) -> Sequence[LayerResults]:
        """Where to write results of such widths, layer by layer; empty if nothing is to be kept.

        ``decoder`` computes them.

        Raises:
            ValueError: the system gives no such memory.
        """
        if not self._is_open:
            return ()
        weights = decoder.marks
        if weights != self._weights:
            self._forget()
            self._weights = weights
        room = self.max_bytes // (sum(map(sum, widths)) * dtype.itemsize)
        shapes = [[(room, width) for width in layer] for layer in widths]
        if shapes != [[tuple(x.shape) for x in layer] for layer in self._results]:
            self._results = []
            self._results = _room(shapes, dtype, self.max_bytes)
        return self._results

    def reserve(self, count: int) -> int | None:
        """The first of ``count`` rows to write to next; None if there is no more room."""
        room = len(self._results[0][0]) if self._results else 0
        if self._is_full or self._used + count > room:
            self._is_full = True  # for fewer rows too: what is known of a completion has no gaps
            return None
        first, self._used = self._used, self._used + count
        return first

    def add(self, prompt: Sequence[int], completion: Sequence[int], rows: list[int]) -> None:
        """Remember in which rows the first tokens of a completion are."""
        key = (tuple(prompt), tuple(completion))
        if len(rows) > len(self._rows.get(key, ())):
            self._rows[key] = rows

    def find(
        self,
        packing: Packing,
        prompts: Sequence[Sequence[int]],
        tokens: Int[Tensor, "B T"],
        counts: Sequence[int],
        *,
        decoder: Decoder,
    ) -> Known | None:
        """What is known of a packed row of these completions; None if nothing is.

        What another ``decoder`` has computed, or this one with other weights, is not given.
        """
        if not self._rows or decoder.marks != self._weights:
            return None
        at, index = torch.full_like(packing.ids, -1), _firsts(packing)
        for prompt, completion, count, first in zip(prompts, tokens, counts, index, strict=True):
            key = (tuple(prompt), tuple(completion[:count].tolist()))
            rows = self._rows.get(key, [])[: max(count - 1, 0)]
            at[first : first + len(rows)] = torch.tensor(rows, dtype=at.dtype)
        rest = (at < 0).nonzero()[:, 0]
        if len(rest) == len(at):
            return None
        at.clamp_(min=0)
        return Known(results=self._results, at=at, rest=rest, owner=self, turn=self.turn)

    def _forget(self) -> None:
        self.turn += 1
        self._is_full, self._used = False, 0
        self._rows.clear()


def _room(
    shapes: Sequence[Sequence[tuple[int, int]]], dtype: torch.dtype, size: int
) -> list[LayerResults]:
    """One piece of memory, cut up; its pages are taken when they are first written to."""
    sizes = [rows * width for layer in shapes for rows, width in layer]
    try:
        parts = iter(torch.empty(sum(sizes), dtype=dtype).split(sizes))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"engine.max_kept_gib = {size / 2**30:g}: the system gives no such memory; lower it"
        ) from error
    return [tuple(next(parts).view(shape) for shape in layer) for layer in shapes]


def _firsts(packing: Packing) -> list[int]:
    """Where each completion's first token stands in the packed row."""
    firsts: list[int] = []
    for group in packing.groups:
        size, longest = group.index.shape
        firsts += group.index[:, 0].tolist() if longest else [0] * size
    return firsts
