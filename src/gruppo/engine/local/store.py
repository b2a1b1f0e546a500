"""Keys and values of what is being drawn: every prompt once, every completion its own tail.

The model's layers hand their new keys and values to a ``LayerStore`` (transformers' cache
interface) and their queries to a step (the attention function's ``SHARED`` argument): a
``Prefill`` computes prompts, a ``Decode`` one token of every running row. Both read the same
buffers, so a prompt's keys exist once for all completions of its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from gruppo import native
from gruppo.model.attention import AttentionRule

_STEP = 128  # columns added when a buffer is full: a copy once in 128 tokens


@final
class LayerStore(CacheLayerMixin):
    """Keys and values of one layer (fills in transformers' plug-in interface).

    ``prompt_keys`` [P, K, W, D] by place, ``own_keys`` [S, K, C, D] by slot; values alike. Unused
    entries are finite, because a masked one still takes part in a product with weight 0. ``rule``
    is that of the prompts' attention, which the completions' follows.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self.prompt_keys = self.prompt_values = torch.empty(0)
        self.own_keys = self.own_values = torch.empty(0)
        self.rule = AttentionRule()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty buffers like the first states handed over."""
        heads = key_states.shape[1]

        def empty(like: Tensor, rows: int) -> Tensor:
            return like.new_zeros((rows, heads, 0, like.shape[3]), dtype=self._store.dtype)

        self.prompt_keys, self.prompt_values = empty(key_states, 0), empty(value_states, 0)
        slots = self._store.slots
        self.own_keys, self.own_values = empty(key_states, slots), empty(value_states, slots)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values to where the present step says; hand them back as they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._store.step.write(self, key_states, value_states)
        return key_states, value_states

    def reserve(self, *, places: int = 0, width: int = 0, columns: int = 0) -> None:
        """Make room for so many prompts of such a length, and so many own tokens."""
        places = max(places, len(self.prompt_keys))
        width = max(width, self.prompt_keys.shape[2])
        self.prompt_keys = _grown(self.prompt_keys, places, width)
        self.prompt_values = _grown(self.prompt_values, places, width)
        if columns > self.own_keys.shape[2]:
            wide = -(-columns // _STEP) * _STEP
            self.own_keys = _grown(self.own_keys, len(self.own_keys), wide)
            self.own_values = _grown(self.own_values, len(self.own_values), wide)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the own keys and values of some slots to others."""
        for buffer in (self.own_keys, self.own_values):
            buffer[target] = buffer[source]

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers."""
        buffers = (self.prompt_keys, self.prompt_values, self.own_keys, self.own_values)
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the buffers lie."""
        buffers = (self.prompt_keys, self.prompt_values, self.own_keys, self.own_values)
        return tuple(buffer.data_ptr() for buffer in buffers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not asked: the engine gives the attention mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Not used: the engine gives the positions."""
        return 0

    def get_max_length(self) -> int:
        """-1: the buffers grow."""
        return -1


@runtime_checkable
class Step(Protocol):
    """What is being computed: takes new keys and values, and attends to those that are kept."""

    def write(self, layer: LayerStore, keys: Tensor, values: Tensor) -> None:
        """Keep new keys and values of one layer."""
        ...

    def attend(self, layer_index: int, query: Tensor, rule: AttentionRule) -> Tensor:
        """Attention [B, Q, H, E] of ``query`` [B, H, Q, D] in one layer."""
        ...


@final
class Store:
    """All layers' buffers, and the step that is being computed."""

    def __init__(self, num_layers: int, *, slots: int, dtype: torch.dtype) -> None:
        self.slots = slots
        self.dtype = dtype
        self.layers = [LayerStore(self) for _ in range(num_layers)]
        self.cache = Cache(layers=list(self.layers))
        self.step: Step = Prefill(self, ())

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the buffers lie; growing moves them."""
        return tuple(address for layer in self.layers for address in layer.addresses)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Move running rows from slot to slot: (from, to)."""
        if not moves:
            return
        source, target = torch.tensor(moves, device=self.layers[0].own_keys.device).t()
        for layer in self.layers:
            layer.move(source, target)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens ``start`` to ``stop`` of the prompt in ``place``; in the packed row from ``first``."""

    place: int
    start: int
    stop: int
    first: int

    @property
    def span(self) -> slice:
        """Where the piece lies in the packed row."""
        return slice(self.first, self.first + self.stop - self.start)


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """Pieces of prompts in one packed row; each sees its own prompt up to itself."""

    store: Store
    pieces: tuple[Piece, ...]

    def write(self, layer: LayerStore, keys: Tensor, values: Tensor) -> None:
        """Keep the pieces' keys and values [1, K, N, D] in their prompts' places."""
        places = max(piece.place for piece in self.pieces) + 1
        layer.reserve(places=places, width=max(piece.stop for piece in self.pieces))
        for piece in self.pieces:
            here = slice(piece.start, piece.stop)
            layer.prompt_keys[piece.place, :, here] = keys[0, :, piece.span]
            layer.prompt_values[piece.place, :, here] = values[0, :, piece.span]

    def attend(
        self, layer_index: int, query: Float[Tensor, "1 H N D"], rule: AttentionRule
    ) -> Float[Tensor, "1 N H E"]:
        """Attention of every piece over its prompt, the piece itself included."""
        layer = self.store.layers[layer_index]
        layer.rule = rule
        mixed = []
        for piece in self.pieces:
            seen = slice(0, piece.stop)
            keys = layer.prompt_keys[None, piece.place, :, seen]
            values = layer.prompt_values[None, piece.place, :, seen]
            queries = torch.arange(piece.start, piece.stop, device=query.device)
            mask = rule.seen(queries[:, None], torch.arange(piece.stop, device=query.device))
            part = query[:, :, piece.span].to(keys.dtype)
            mixed.append(rule.attend(part, keys, values, mask[None, None]))
        return torch.cat(mixed, dim=1)


@dataclass(slots=True, eq=False)
class Decode:
    """One token of every running row: it sees its prompt (shared) and its own tokens.

    ``places`` are the rows' prompts (``place`` [N] the same), ``prompt_length`` [N] their lengths,
    ``own_length`` [N] the tokens each has in the store, the one being computed not counted.
    ``kept_at`` is where the first row's activations are to be kept, those of the others after it.
    """

    store: Store
    places: Sequence[int]
    place: Int[Tensor, "N"]
    prompt_length: Int[Tensor, "N"]
    own_length: Int[Tensor, "N"]
    columns: int
    _masks: dict[int | None, Tensor]
    kept_at: int | None = None
    _grouping: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def of(
        store: Store, places: Sequence[int], prompt_length: Tensor, own_length: Tensor
    ) -> Decode:
        """The step after the rows have changed; ``advance`` makes the next of the same rows."""
        return Decode(
            store=store,
            places=places,
            place=torch.tensor(places, device=own_length.device),
            prompt_length=prompt_length,
            own_length=own_length,
            columns=int(own_length.max()) + 1,
            _masks={},
        )

    def advance(self) -> None:
        """Go on to the next token of the same rows."""
        self.own_length = self.own_length + 1
        self.columns += 1
        self._masks = {}

    @property
    def positions(self) -> Int[Tensor, "N"]:
        """Position ids of the rows' tokens, as the model counts them (prompt included)."""
        return self.prompt_length + self.own_length

    def write(self, layer: LayerStore, keys: Tensor, values: Tensor) -> None:
        """Keep one new key and value [N, K, 1, D] a row."""
        layer.reserve(columns=self.columns)
        rows = torch.arange(len(keys), device=keys.device)
        layer.own_keys[rows, :, self.own_length] = keys[:, :, 0].to(layer.own_keys.dtype)
        layer.own_values[rows, :, self.own_length] = values[:, :, 0].to(layer.own_values.dtype)

    def attend(
        self, layer_index: int, query: Float[Tensor, "N H 1 D"], rule: AttentionRule
    ) -> Float[Tensor, "N 1 H E"]:
        """Attention of one query a row over its prompt and its own tokens."""
        layer = self.store.layers[layer_index]
        query = query.to(layer.own_keys.dtype)
        same_width = layer.own_values.shape[3] == query.shape[3]
        if rule.is_plain and same_width and native.can_attend(query):
            return self.attend_natively(layer, query[:, :, 0], rule)[:, None]
        return self._plain(layer, query, rule)

    def attend_natively(
        self, layer: LayerStore, query: Float[Tensor, "N H D"], rule: AttentionRule
    ) -> Float[Tensor, "N H D"]:
        """The same by the compiled kernel, for a plain rule and a type that it takes."""
        assert rule.is_plain, "the kernel knows no soft cap and no sinks"
        return native.decode_attention(
            query,
            layer.prompt_keys,
            layer.prompt_values,
            layer.own_keys,
            layer.own_values,
            place=self.place,
            prompt_length=self.prompt_length,
            own_length=self.own_length,
            scaling=query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling,
            window=rule.window,
        )

    def kept(self, layer: LayerStore, results: Sequence[Tensor] = ()) -> native.Kept:
        """A layer's keys and values for the kernels, which know a plain rule alone.

        ``results`` take what the layer's products make.
        """
        rule, width = layer.rule, layer.own_keys.shape[3]
        assert rule.is_plain, "the kernel knows no soft cap and no sinks"
        return native.Kept(
            prompt_keys=layer.prompt_keys,
            prompt_values=layer.prompt_values,
            own_keys=layer.own_keys,
            own_values=layer.own_values,
            scaling=width**-0.5 if rule.scaling is None else rule.scaling,
            window=rule.window,
            results=results,
        )

    def _plain(self, layer: LayerStore, query: Tensor, rule: AttentionRule) -> Tensor:
        count, heads = query.shape[:2]
        keys, values = layer.own_keys[:count, :, : self.columns], layer.own_values[:count]
        grouped = query.view(count, keys.shape[1], -1, query.shape[-1])  # [N, K, H / K, D]
        by_place, _ = self._groups()
        shared = self._together(grouped) @ layer.prompt_keys[: len(by_place)].mT
        scores = torch.cat([self._apart(shared), grouped @ keys.mT], dim=-1)
        mask = self._mask(layer, rule)
        flat = scores.flatten(1, 2)[:, :, None]
        weights = rule.weights(flat, mask, width=query.shape[-1])
        weights = weights.to(values.dtype).view(scores.shape)
        width = layer.prompt_keys.shape[2]
        shared = self._together(weights[..., :width])
        mixed = self._apart(shared @ layer.prompt_values[: len(by_place)])
        mixed = mixed + weights[..., width:] @ values[:, :, : self.columns]
        return mixed.reshape(count, 1, heads, -1)

    def _together(self, rows: Float[Tensor, "N K R X"]) -> Float[Tensor, "P K GR X"]:
        """Rows of one prompt side by side, so that its keys are read once for all of them."""
        by_place, _ = self._groups()
        return rows[by_place].transpose(1, 2).flatten(2, 3)

    def _apart(self, shared: Float[Tensor, "P K GR X"]) -> Float[Tensor, "N K R X"]:
        """The opposite of ``_together``."""
        by_place, back = self._groups()
        group = by_place.shape[1]
        return shared.unflatten(2, (group, -1)).transpose(1, 2).flatten(0, 1)[back]

    def _groups(self) -> tuple[Int[Tensor, "P G"], Int[Tensor, "N"]]:
        """The rows of every place (row 0 where there are fewer), and where a row stands there."""
        if self._grouping is None:
            rows: list[list[int]] = [[] for _ in range(max(self.places) + 1)]
            stands = []
            for row, place in enumerate(self.places):
                stands.append((place, len(rows[place])))
                rows[place].append(row)
            widest, device = max(map(len, rows)), self.place.device
            by_place = torch.tensor([r + [0] * (widest - len(r)) for r in rows], device=device)
            back = torch.tensor([place * widest + at for place, at in stands], device=device)
            self._grouping = by_place, back
        return self._grouping

    def _mask(self, layer: LayerStore, rule: AttentionRule) -> Bool[Tensor, "N 1 1 S"]:
        """What each row sees of the prompts' columns and of its own."""
        if rule.window not in self._masks:
            width, device = layer.prompt_keys.shape[2], self.place.device
            prompt = torch.arange(width, device=device)
            own = torch.arange(self.columns, device=device)
            length = self.prompt_length[:, None]
            there = torch.cat([prompt < length, own <= self.own_length[:, None]], dim=1)
            position = torch.cat([prompt.expand(len(length), -1), length + own], dim=1)
            seen = there & rule.seen(self.positions[:, None], position)
            self._masks[rule.window] = seen[:, None, None]
        return self._masks[rule.window]


def _grown(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """``buffer`` [R, K, C, D] in a larger one of zeros, or itself if it is large enough."""
    if buffer.shape[0] >= rows and buffer.shape[2] >= columns:
        return buffer
    wide = buffer.new_zeros((rows, buffer.shape[1], columns, buffer.shape[3]))
    wide[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return wide
