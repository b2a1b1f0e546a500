"""An engine that runs the policy's own module in this process.

It shares weights with the policy by default, so sampling and training differ by rounding alone. A
prompt is computed once for its group, whose completions share its keys and values; a completion
that ends makes room for the next one at once. Models for which that is not possible (found out by
trying) are drawn in plain waves. On CUDA the decode step is captured and replayed (``graphs.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from gruppo import native
from gruppo.engine.base import (
    Decode,
    EngineKind,
    check_requests,
    check_sampling,
    complete,
    ends_in_stop,
    room,
)
from gruppo.engine.local.batch import plan_waves
from gruppo.engine.local.capture import capture_for
from gruppo.engine.local.fused import FusedStep
from gruppo.engine.local.graphs import Replays
from gruppo.engine.local.module import HALF, copy_weights, generating
from gruppo.engine.local.packed import WORTHWHILE, packed_linears, plain_product
from gruppo.engine.local.probe import can_fuse, can_share
from gruppo.engine.local.schedule import Row, Schedule, rows_of
from gruppo.engine.local.shared import Advance, Drawing, Drawn, Spoken
from gruppo.engine.local.store import Store
from gruppo.engine.local.waves import Waves
from gruppo.memory import Fitting
from gruppo.model.activations import Activations
from gruppo.model.decoder import Decoder, find_decoder
from gruppo.model.parts import context_length, text_config
from gruppo.model.products import Products, choosing
from gruppo.types import Completion, Request, Sampling

_COMPUTE_DTYPES = (torch.float32, torch.float64, *HALF)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ready:
    """What one call draws with."""

    store: Store
    advance: Advance | None = None
    activations: Activations | None = None
    replays: Replays | None = None

    @property
    def num_bytes(self) -> int:
        return self.store.num_bytes if self.replays is None else self.replays.peak_bytes


@final
class LocalEngine:
    """Draws completions with a Hugging Face causal language model in this process.

    ``is_shared`` says whether groups share their prompt; ``peak_cache_bytes`` is the most memory
    that keys and values took in the last call; on CUDA with graphs and 16-bit weights.
    ``activations`` hold what was computed of drawn tokens.

    Args:
        model: the module, with an adapter or without (shared with the policy, or the engine's
            own). Its train or eval mode, its ``requires_grad`` flags and gradients are as before
            after every call.
        decode: token ids to text, for ``Completion.text`` and stop strings.
        pad_token: any valid token id; fills the left of shorter prompts, and is masked.
        compute_dtype: bfloat16 or float16 runs a float32 model under autocast; a model whose
            weights have another type than float32 runs as it is.
        max_rows: most completions decoded at once. Which completions are drawn does not depend on
            it, except for rounding of the logits.
        max_cached_tokens: most tokens whose keys and values are held at once, every prompt counted
            once and every running completion with its whole budget; None for no bound.
        kind: "plain" never shares a prompt's keys nor refills a running batch.
        products: what multiplies on a CPU, as in training ("onednn" and "torch" are one here).
        activations: take what is computed of drawn tokens while they are open, where one kernel
            computes all layers; for an engine that shares the policy's module.

    Raises:
        ValueError: an argument cannot be used.
    """

    def __init__(  # noqa: PLR0913 - a model, its text, and how to compute
        self,
        model: nn.Module,
        decode: Decode,
        *,
        pad_token: int,
        compute_dtype: torch.dtype = torch.float32,
        max_rows: int = 128,
        max_cached_tokens: int | None = None,
        kind: EngineKind = "shared",
        products: Products = "torch",
        activations: Activations | None = None,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows = {max_rows}; use 1 or more")
        if max_cached_tokens is not None and max_cached_tokens < 1:
            raise ValueError(f"max_cached_tokens = {max_cached_tokens}; use 1 or more, or None")
        if compute_dtype not in _COMPUTE_DTYPES:
            raise ValueError(f"compute_dtype = {compute_dtype}; use bfloat16, float16 or float32")
        if kind not in ("shared", "plain"):
            raise ValueError(f'kind = {kind!r}; use "shared" or "plain"')
        if products not in ("torch", "onednn", "native"):
            raise ValueError(f'products = {products!r}; use "torch", "onednn" or "native"')
        self._model: nn.Module | None = model
        self._decode = decode
        self._pad_token = pad_token
        self._compute_dtype = compute_dtype
        self._max_rows = max_rows
        self._products: Products = products
        self._max_cached_tokens = max_cached_tokens
        self.activations = activations or Activations()
        self._fitting = Fitting("engine.max_rows")
        self._version = 0
        self._is_aborted = False
        self.is_shared = kind == "shared" and can_share(model, compute_dtype)
        self._can_fuse = self.is_shared and can_fuse(model, compute_dtype)
        capture = capture_for(next(model.parameters()).device) if self.is_shared else None
        self._replays = None if capture is None else Replays(capture, compute_dtype)
        self.peak_cache_bytes = 0

    @property
    def can_keep(self) -> bool:
        """Whether ``activations`` take what is computed: the own kernels do it for all layers."""
        decoder = find_decoder(self._open()) if self._can_fuse else None
        if decoder is None or self._products != "native":
            return False
        return native.can_multiply(self._compute_dtype) and _is_even(decoder)

    @property
    def version(self) -> int:
        """Version of the weights, as last told by ``load``."""
        return self._version

    def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> list[tuple[Completion, ...]]:
        """Draw ``num_samples`` completions for every request, in the order of the requests.

        A completion ends with a stop token or stop string ("stop"), or when ``max_tokens`` or the
        model's context is used up ("length").

        Raises:
            ValueError: for a request or a sampling field that cannot be honoured, or after close.
            FloatingPointError: if the model's logits hold NaN or inf.
            OutOfMemory: one completion at a time does not fit. With more at once, memory running
                out lowers ``max_rows`` (told once); what is drawn stays the same.
        """
        self._is_aborted = False
        model = self._open()
        context = context_length(model)
        check_sampling(sampling)
        check_requests(requests, vocab_size=text_config(model).vocab_size, context=context)
        limits = [room(request, sampling, context) for request in requests]
        draw, kept = self._shared if self.is_shared else self._plain, self.activations.num_tokens
        drawn = self._fitting.do(
            lambda max_rows: draw(model, requests, limits, sampling, max_rows),
            self._max_rows,
            total=sum(request.num_samples for request in requests),
            undo=lambda: self.activations.rewind(kept),
        )
        return [
            tuple(
                self._complete(drawn, request, Row(request=index, sample=at, limit=limit), sampling)
                for at in range(request.num_samples)
            )
            for index, (request, limit) in enumerate(zip(requests, limits, strict=True))
        ]

    def abort(self) -> None:
        """End the present ``generate`` at its next token, from another thread or a callback.

        Its running completions are returned as they are and those not begun empty, both with
        ``finish = "abort"``. Plain waves end with their wave.
        """
        self._is_aborted = True

    def load(self, weights: Mapping[str, Tensor] | None, version: int) -> None:
        """Take new weights and their version number.

        Args:
            weights: None if the module is shared with the policy, which has changed it already;
                else a tensor for every name of the model's state (of tied ones, any).
            version: recorded with every token drawn from now on.

        Raises:
            ValueError: if names or shapes are not the model's; nothing is changed then.
        """
        if weights is not None:
            copy_weights(self._open(), weights)
        self._version = version

    def close(self) -> None:
        """Let go of the model and of what was captured. Calling it twice is fine."""
        self._model = None
        if self._replays is not None:
            self._replays.drop()

    def _open(self) -> nn.Module:
        if self._model is None:
            raise ValueError("this engine is closed; make a new LocalEngine")
        return self._model

    def _shared(
        self,
        model: nn.Module,
        requests: Sequence[Request],
        limits: Sequence[int],
        sampling: Sampling,
        max_rows: int,
    ) -> dict[Row, Drawn]:
        rows = rows_of(requests, limits)
        schedule = Schedule(rows, requests, max_rows=max_rows, max_tokens=self._max_cached_tokens)
        slots = min(max_rows, len(rows))
        if self._max_cached_tokens and rows:  # more than these are never admitted together
            slots = min(slots, max(1, self._max_cached_tokens // min(row.limit for row in rows)))
        width = max((len(request.tokens) for request in requests), default=1)
        with self._ready(model, slots, width=width, steps=max(limits, default=0)) as ready:
            drawing = Drawing(
                model,
                requests,
                schedule,
                sampling=sampling,
                store=ready.store,
                spoken=_spoken(self._decode, sampling),
                advance=ready.advance,
                activations=ready.activations,
                replays=ready.replays,
            )
            while not (schedule.is_done or self._is_aborted):
                drawing.turn()
        drawing.abort()
        self.peak_cache_bytes = ready.num_bytes
        return drawing.drawn

    @contextmanager
    def _ready(self, model: nn.Module, slots: int, *, width: int, steps: int) -> Iterator[_Ready]:
        """Within, the model draws in ``slots`` slots, at most ``steps`` tokens a row."""
        replays = self._replays
        if replays is not None and not replays.is_broken and slots:
            with replays.ready(model, slots=slots, width=width, columns=steps) as store:
                yield _Ready(store=store, replays=replays)
            return
        with generating(model, self._compute_dtype) as dtype:
            # anew at every call: an adapter or a hook may have come
            decoder = find_decoder(model) if self._can_fuse else None
            together = decoder.together if decoder else ()
            copies = (
                packed_linears(model, dtype, rows=slots, together=together, products=self._products)
                if steps >= WORTHWHILE or (decoder and self.activations.is_open)
                else nullcontext(plain_product)
            )
            with copies as products, choosing(self._products):
                layers = text_config(model).num_hidden_layers
                store = Store(layers, slots=slots, dtype=dtype or next(model.parameters()).dtype)
                kept = self.activations
                advance = FusedStep(decoder, products, store, kept) if decoder else None
                keeps = advance is not None and advance.keeps
                yield _Ready(store=store, advance=advance, activations=kept if keeps else None)

    def _plain(
        self,
        model: nn.Module,
        requests: Sequence[Request],
        limits: Sequence[int],
        sampling: Sampling,
        max_rows: int,
    ) -> dict[Row, Drawn]:
        drawn: dict[Row, Drawn] = {}
        self.peak_cache_bytes = 0
        with generating(model, self._compute_dtype) as dtype:
            waves = Waves(
                model=model,
                requests=requests,
                sampling=sampling,
                pad_token=self._pad_token,
                dtype=dtype,
                spoken=_spoken(self._decode, sampling),
            )
            for rows in plan_waves(requests, limits, max_rows=max_rows):
                if not self._is_aborted:
                    found, held = waves.draw(rows)
                    drawn |= found
                    self.peak_cache_bytes = max(self.peak_cache_bytes, held)
        return drawn

    def _complete(
        self, drawn: Mapping[Row, Drawn], request: Request, row: Row, sampling: Sampling
    ) -> Completion:
        unbegun = Drawn(tokens=[], logp=[], stopped=False, aborted=row.limit > 0)
        found = drawn.get(row, unbegun)
        made = complete(
            found.tokens,
            found.logp,
            stopped=found.stopped,
            sampling=sampling,
            version=self._version,
            decode=self._decode,
        )
        self.activations.add(request.tokens, made.tokens, found.kept)
        return replace(made, finish="abort") if found.aborted else made


def _is_even(decoder: Decoder) -> bool:
    """Whether the kernels, which read numbers in pairs, can read all rows of the layers."""
    groups = [group for layer in decoder.layers for group in layer.joints]
    return all(group[0].in_features % 2 == 0 for group in groups)


def _spoken(decode: Decode, sampling: Sampling) -> Spoken | None:
    """How to see that rows have just completed a stop string; None if there are none."""
    if not sampling.stop:
        return None
    return lambda rows: [ends_in_stop(row, stop=sampling.stop, decode=decode) for row in rows]
