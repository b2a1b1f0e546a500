"""A decode step over fixed addresses and shapes, as a CUDA graph needs it.

The same attention as ``store.Decode``: every row sees its prompt, which its group shares, and its
own tokens. But nothing here depends on a number that only the device knows, nor allocates what
must outlive the step. It is plain torch and runs on any device; capturing is ``graphs.py``'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gruppo.engine.local.seats import Bucket, Seating, most_inputs
from gruppo.engine.local.store import LayerStore, Store
from gruppo.model.attention import AttentionRule


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Views:
    """The step's inputs for R rows in B blocks of G: parts of one buffer; see ``Seating``."""

    tokens: Int[Tensor, "R"]
    active: Int[Tensor, "R"]
    prompt_length: Int[Tensor, "R"]
    own_length: Int[Tensor, "R"]
    back: Int[Tensor, "R"]
    members: Int[Tensor, "BG"]
    places: Int[Tensor, "B"]


@final
class Inputs:
    """Where the inputs of all buckets of up to ``slots`` rows lie; never reallocated."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._flat = torch.zeros(most_inputs(slots), dtype=torch.long, device=device)

    @property
    def num_bytes(self) -> int:
        """Memory of the buffer."""
        return self._flat.numel() * self._flat.element_size()

    def views(self, bucket: Bucket) -> Views:
        """The parts that a step of this bucket reads; ``width`` and ``columns`` play no role."""
        rows, blocks = bucket.rows, bucket.blocks
        parts = self._flat[: bucket.num_inputs].split([rows] * 5 + [blocks * bucket.block, blocks])
        return Views(
            tokens=parts[0],
            active=parts[1],
            prompt_length=parts[2],
            own_length=parts[3],
            back=parts[4],
            members=parts[5],
            places=parts[6],
        )

    def fill(self, bucket: Bucket, seating: Seating) -> None:
        """Write a seating by one copy that the host does not wait for; tokens are 0."""
        numbers = torch.tensor(
            [0] * bucket.rows
            + seating.active
            + seating.prompt_length
            + seating.own_length
            + seating.back
            + seating.members
            + seating.places
        )
        if self._flat.is_cuda:  # only pinned memory is read while the host goes on
            numbers = numbers.pin_memory()
        self._flat[: bucket.num_inputs].copy_(numbers, non_blocking=True)


@dataclass(frozen=True, slots=True, eq=False)
class StaticStep:
    """One token of every row of a bucket. Made anew for every capture: it keeps masks."""

    store: Store
    inputs: Views
    bucket: Bucket
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> Int[Tensor, "R 1"]:
        """Position ids of the rows' tokens, as the model counts them (prompt included)."""
        return (self.inputs.prompt_length + self.inputs.own_length)[:, None]

    def write(self, layer: LayerStore, keys: Tensor, values: Tensor) -> None:
        """Keep one new key and value [R, K, 1, D] a row, in the slot of its number."""
        rows = torch.arange(len(keys), device=keys.device)
        at = self.inputs.own_length
        layer.own_keys[rows, :, at] = keys[:, :, 0].to(layer.own_keys.dtype)
        layer.own_values[rows, :, at] = values[:, :, 0].to(layer.own_values.dtype)

    def attend(
        self, layer_index: int, query: Float[Tensor, "R H 1 D"], rule: AttentionRule
    ) -> Float[Tensor, "R 1 H E"]:
        """Attention of one query a row over its prompt and its own tokens."""
        layer, bucket = self.store.layers[layer_index], self.bucket
        rows, columns, width = bucket.rows, bucket.columns, bucket.width
        keys, values = layer.own_keys[:rows, :, :columns], layer.own_values[:rows, :, :columns]
        query = query.to(keys.dtype)
        grouped = query.reshape(rows, keys.shape[1], -1, query.shape[-1])  # [R, K, H / K, D]
        # a prompt's columns are copied once for a block, not once for a row
        shared = self._together(grouped) @ self._prompts(layer.prompt_keys).mT
        scores = torch.cat([self._apart(shared), grouped @ keys.mT], dim=-1)
        flat = scores.flatten(1, 2)[:, :, None]
        weights = rule.weights(flat, self._mask(rule), width=query.shape[-1])
        weights = weights.to(values.dtype).view(scores.shape)
        shared = self._together(weights[..., :width]) @ self._prompts(layer.prompt_values)
        mixed = self._apart(shared) + weights[..., width:] @ values
        return mixed.reshape(rows, 1, query.shape[1], -1)

    def _prompts(self, buffer: Float[Tensor, "P K W D"]) -> Float[Tensor, "B K w D"]:
        """Every block's prompt."""
        return buffer[:, :, : self.bucket.width].index_select(0, self.inputs.places)

    def _together(self, rows: Float[Tensor, "R K Q X"]) -> Float[Tensor, "B K GQ X"]:
        """Rows of a block side by side."""
        members = rows.index_select(0, self.inputs.members)
        return members.unflatten(0, (-1, self.bucket.block)).transpose(1, 2).flatten(2, 3)

    def _apart(self, shared: Float[Tensor, "B K GQ X"]) -> Float[Tensor, "R K Q X"]:
        """The opposite of ``_together``."""
        apart = shared.unflatten(2, (self.bucket.block, -1)).transpose(1, 2).flatten(0, 1)
        return apart.index_select(0, self.inputs.back)

    def _mask(self, rule: AttentionRule) -> Bool[Tensor, "R 1 1 S"]:
        """What each row sees of its prompt's columns and of its own."""
        if rule.window not in self._masks:
            device = self.inputs.tokens.device
            prompt = torch.arange(self.bucket.width, device=device)
            own = torch.arange(self.bucket.columns, device=device)
            length = self.inputs.prompt_length[:, None]
            there = torch.cat([prompt < length, own <= self.inputs.own_length[:, None]], dim=1)
            position = torch.cat([prompt.expand(len(length), -1), length + own], dim=1)
            seen = there & rule.seen(self.positions, position)
            self._masks[rule.window] = seen[:, None, None]
        return self._masks[rule.window]
