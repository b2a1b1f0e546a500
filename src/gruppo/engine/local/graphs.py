"""Decode steps that are captured once and replayed: no launch of a thousand kernels per token.

Everything a step reads lies at fixed addresses: its inputs, the keys and values, the weights. A
step is captured for a ``Bucket`` of shapes when it is first needed, and again only when an address
has changed: buffers that had to grow, weights moved to other storage, an adapter switched. Weights
that are updated in place stay where they are, so captures live on over training steps; so do the
buffers, as far as they take a quarter of the device's memory at most.

A model that cannot be captured (it asks the device for a number, as some mixtures of experts do)
is drawn step by step, which the log says once. Prompts are computed, and tokens drawn, outside.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gruppo.engine.local.capture import Capture, Work
from gruppo.engine.local.forward import forward
from gruppo.engine.local.halves import Halves
from gruppo.engine.local.module import generating
from gruppo.engine.local.seats import (
    Bucket,
    Seat,
    fitting,
    round_columns,
    round_places,
    round_rows,
    seating,
)
from gruppo.engine.local.static import Inputs, StaticStep, Views
from gruppo.engine.local.store import Store
from gruppo.memory import is_out_of_memory
from gruppo.model.parts import text_config

_log: Final = logging.getLogger(__name__)
_COLUMNS = 128  # least columns of own keys: those of the store's own growth
_WIDTH = 64  # least columns of prompts' keys
_MOST_GRAPHS = 64  # each takes some MB of the driver's own memory


@dataclass(slots=True, kw_only=True, eq=False)
class _Held:
    """What captures refer to by address, and the captures; ``graphs``: the latest used last."""

    model: nn.Module
    store: Store
    inputs: Inputs
    fingerprint: object
    addresses: tuple[int, ...] = ()
    output: Tensor | None = None
    graphs: dict[Bucket, Work] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True, eq=False)
class _Seated:
    """The running rows' step: how many there are, and the longest one's own tokens."""

    count: int
    longest: int
    bucket: Bucket
    views: Views
    is_fresh: bool = True


@final
class Replays:
    """The decode steps of one engine. ``is_broken``: this model cannot be captured."""

    def __init__(self, capture: Capture, compute_dtype: torch.dtype) -> None:
        self.is_broken = False
        self.peak_bytes = 0
        self._capture = capture
        self._compute_dtype = compute_dtype
        self._halves = Halves()
        self._held: _Held | None = None
        self._seated: _Seated | None = None
        self._width = self._columns = 0

    @property
    def num_bytes(self) -> int:
        """All memory that is held: keys, values, inputs, outputs, captures and 16-bit copies."""
        held = self._held
        if held is None:
            return self._halves.num_bytes
        output = 0 if held.output is None else held.output.numel() * held.output.element_size()
        own = held.store.num_bytes + held.inputs.num_bytes + output
        return own + self._capture.num_bytes + self._halves.num_bytes

    @contextmanager
    def ready(self, model: nn.Module, *, slots: int, width: int, columns: int) -> Iterator[Store]:
        """Within, ``model`` draws: at most ``slots`` rows at once, prompts of at most ``width``.

        ``columns`` is the largest budget of a row. Yields the store, the same at every call as
        long as it is large enough.
        """
        self._width, self._columns = round_columns(width, _WIDTH), columns
        try:
            with (
                generating(model, self._compute_dtype, keeps_casts=False) as dtype,
                self._halves.standing_in(model, dtype),
            ):
                held = self._hold(model, round_rows(slots), dtype)
                yield held.store
                self.peak_bytes = self.num_bytes
        except BaseException:
            self.drop()  # what was kept may hold NaN, or be what memory lacks
            raise
        self._seated = None
        if self.is_broken or self.peak_bytes > self._capture.budget:
            self.drop()

    def seat(self, seats: Sequence[Seat]) -> None:
        """Take note of the running rows, after they have changed."""
        longest = max(seat.own_length for seat in seats) + 1
        columns = round_columns(longest, _COLUMNS)
        bucket = fitting(seats, width=self._width, columns=columns)
        held = self._holding()
        views = held.inputs.views(bucket)
        held.inputs.fill(bucket, seating(seats, bucket))
        self._seated = _Seated(count=len(seats), longest=longest, bucket=bucket, views=views)
        self._make_room(held, places=max(seat.place for seat in seats) + 1, columns=columns)

    def logits(self, token: Int[Tensor, "N"]) -> Float[Tensor, "N V"] | None:
        """Logits after ``token``, the last of every seated row; None if it cannot be captured.

        They are overwritten by the next call.
        """
        held, seated = self._holding(), self._seated
        assert seated is not None, "seat() comes first"
        if seated.is_fresh:
            seated.is_fresh = False
        else:
            self._advance(held, seated)
        seated.views.tokens[: seated.count].copy_(token)
        try:
            graph = self._graph(held, seated)
        except Exception as error:  # whatever a model's own code makes of being captured
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            _log.warning("decoding without CUDA graphs: this model has none (%s)", reason)
            self.is_broken = True
            return None
        graph()
        assert held.output is not None, "made with the first graph"
        return held.output[: seated.count]

    def drop(self) -> None:
        """Free everything."""
        self._held = self._seated = None
        self._halves.drop()
        self._capture.forget()

    def _holding(self) -> _Held:
        assert self._held is not None, "within ready()"
        return self._held

    def _hold(self, model: nn.Module, slots: int, dtype: torch.dtype | None) -> _Held:
        """What is held, if it is still true and large enough; else anew."""
        fingerprint = (_fingerprint(model), self._halves.addresses)
        held = self._held
        if held is None or held.fingerprint != fingerprint or held.store.slots < slots:
            self._held = held = None  # the old goes before the new comes
            self._capture.forget()
            weight = next(model.parameters())
            layers = text_config(model).num_hidden_layers
            self._held = held = _Held(
                model=model,
                store=Store(layers, slots=slots, dtype=dtype or weight.dtype),
                inputs=Inputs(slots, weight.device),
                fingerprint=fingerprint,
            )
        return held

    def _advance(self, held: _Held, seated: _Seated) -> None:
        """Go on to the next token of the same rows."""
        seated.views.own_length.add_(seated.views.active)
        seated.longest += 1
        if seated.longest > seated.bucket.columns:
            columns = round_columns(seated.longest, _COLUMNS)
            seated.bucket = replace(seated.bucket, columns=columns)
            self._make_room(held, places=0, columns=columns)

    def _make_room(self, held: _Held, *, places: int, columns: int) -> None:
        """Let the buffers grow in large steps, because captures of the old ones are lost."""
        layers = [layer for layer in held.store.layers if layer.is_initialized]
        whole = round_columns(self._columns, _COLUMNS)
        column = sum(
            len(buffer) * buffer.shape[1] * buffer.shape[3] * buffer.element_size()
            for layer in layers
            for buffer in (layer.own_keys, layer.own_values)
        )
        if column * whole <= self._capture.budget // 2:
            columns = max(columns, whole)  # at once to what the longest completion may need
        for layer in layers:
            layer.reserve(
                places=round_places(places) if places else 0, width=self._width, columns=columns
            )

    def _graph(self, held: _Held, seated: _Seated) -> Work:
        addresses = held.store.addresses
        if addresses != held.addresses:
            held.graphs.clear()
            self._capture.forget()
            held.addresses = addresses
        graph = held.graphs.pop(seated.bucket, None)
        if graph is None:
            if len(held.graphs) >= _MOST_GRAPHS:
                del held.graphs[next(iter(held.graphs))]
            graph = self._captured(held, seated)
        held.graphs[seated.bucket] = graph
        return graph

    def _captured(self, held: _Held, seated: _Seated) -> Work:
        model, store, bucket, views = held.model, held.store, seated.bucket, seated.views

        def logits() -> Tensor:
            step = StaticStep(store, views, bucket)
            return forward(model, store, step, views.tokens[:, None], step.positions)[:, -1]

        if held.output is None:
            like = logits()
            held.output = like.new_empty(store.slots, like.shape[1])
        output = held.output[: bucket.rows]

        def work() -> None:
            # doing it twice changes nothing: keys and values go to the same entries again
            output.copy_(logits())

        return self._capture.record(work)


def _fingerprint(model: nn.Module) -> object:
    """What a capture of ``model`` takes for granted: where weights lie, and how it is switched.

    Switches are plain attributes of the modules: an adapter that is off, or merged, say.
    """
    tensors = tuple(
        (tensor.data_ptr(), tensor.requires_grad, tensor.dtype)
        for tensor in chain(model.parameters(), model.buffers())
    )
    switches = tuple(
        (name, repr(value))
        for module in model.modules()
        for name, value in vars(module).items()
        if _is_plain(value)
    )
    return tensors, switches


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)
