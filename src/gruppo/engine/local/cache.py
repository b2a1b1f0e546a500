"""The key-value cache of a running batch: written in place, rows dropped without a copy.

Transformers' own dynamic cache joins the old and the new keys at every token, which copies the
whole cache each step. The layer here owns a buffer with room to spare. Only plain full-attention
layers are replaced; sliding-window, linear and shared layers stay as the model's config makes
them. It does not share a prompt's keys between the rows of a group: each row holds its own copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast, final

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

_STEP = 128  # columns added when a buffer is full: a copy once in 128 tokens


def make_cache(config: PretrainedConfig, dtype: torch.dtype | None) -> DynamicCache:
    """An empty cache for a model of this config.

    Args:
        config: the model's config; it says what kind of cache each layer needs.
        dtype: type to keep keys and values in; None keeps what the model hands over. Under
            autocast the rotary embedding leaves keys in float32, and attention would round them
            to the compute type at every step anew.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        GrowingLayer(dtype) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def select_rows(cache: DynamicCache, index: Int[Tensor, "M"]) -> None:
    """Make row ``i`` of every layer what row ``index[i]`` was; ``index`` may repeat rows."""
    cache.reorder_cache(cast(torch.LongTensor, index))


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes that the layers hold, whatever their kind; a buffer that is seen twice counts once."""
    held: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    held[storage._cdata] = storage.nbytes()
    return sum(held.values())


def plain_columns(prompt: int, tokens: int, *, copied: bool) -> int:
    """Columns of a row's buffers once it has drawn ``tokens``; the last is never handed over.

    ``copied``: its prompt was computed for other rows too, and copied into wider buffers.
    """
    columns = prompt + (_STEP if copied else 0)
    missing = prompt + tokens - 1 - columns
    return columns + (_STEP + 1) * -(-max(0, missing) // (_STEP + 1))


@final
class GrowingLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer, in buffers [rows, heads, columns, width].

    It fills in transformers' abstract layer (that class is its plug-in interface). ``keys`` and
    ``values`` are views of what is filled.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._storage = dtype
        self._length = 0
        self._rows = 0
        self._buffers: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set the number of rows and make empty buffers like the first states handed over."""
        self._rows = key_states.shape[0]
        self._buffers = tuple(
            state.new_empty((*state.shape[:2], 0, state.shape[3]), dtype=self._storage)
            for state in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new columns [rows, heads, n, width] and return all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[2]
        if self._length > self._buffers[0].shape[2]:
            self._resize(self._length + (_STEP if start else 0))
        keys, values = self._buffers
        keys[: self._rows, :, start : self._length] = key_states
        values[: self._rows, :, start : self._length] = value_states
        return self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row ``i`` what row ``beam_idx[i]`` was.

        As long as there are not more rows than before, only rows that differ are written: when a
        batch fills the hole of an ended row with its last one, one row is copied, not the cache.
        """
        count = len(beam_idx)
        if count <= self._rows:
            moved = (beam_idx != torch.arange(count, device=beam_idx.device)).nonzero().squeeze(1)
            for buffer in self._buffers:
                filled = buffer[:, :, : self._length]
                filled[moved] = filled[beam_idx[moved]]
        else:
            # Room for the next columns is made here, so that the first new token need not copy.
            wide = tuple(self._wider(count, self._length + _STEP))
            for new, old in zip(wide, self._buffers, strict=True):
                filled = new[:, :, : self._length]
                torch.index_select(old[:, :, : self._length], 0, beam_idx, out=filled)
            self._buffers = wide
        self._rows = count
        self._show()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention will see, and the offset of the first (none is ever dropped)."""
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns filled."""
        return self._length

    def get_max_length(self) -> int:
        """-1: the buffers grow."""
        return -1

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[: self._rows, :, : self._length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def _resize(self, columns: int) -> None:
        wide = tuple(self._wider(self._rows, columns))
        for new, old in zip(wide, self._buffers, strict=True):
            new[:, :, : old.shape[2]] = old[: self._rows]
        self._buffers = wide

    def _wider(self, rows: int, columns: int) -> Iterator[Tensor]:
        """Unfilled buffers of that many rows and columns."""
        for buffer in self._buffers:
            yield buffer.new_empty((rows, buffer.shape[1], columns, buffer.shape[3]))
