"""All layers of a decode step in one call of the compiled kernels (``decode.cpp``).

Calling them one by one, as the parts of this package do, costs more time in Python than some of
them take. Their arguments are laid out once for a call of ``generate``; only where keys and values
lie is looked up at every step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.native.compiled import TYPES, kernel
from gruppo.native.product import PanelProduct, can_multiply

NormWeight = tuple[Float[Tensor, "E"], float]
"""Weight, in float32, and epsilon of an RMS norm."""
HeadNorm = tuple[Float[Tensor, "D"], float]
"""The same of one that heads share."""
Product = Callable[[Tensor], Tensor]
"""Rows [N, I] times a matrix, plus a bias."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DecodeLayer:
    """A layer's norms, and what multiplies rows by its matrices: for ``can_decode``, panels do."""

    before_attention: NormWeight
    query_key_value: Product
    head_norms: tuple[HeadNorm | None, HeadNorm | None]
    out: Product
    before_mlp: NormWeight
    gate_up: Product
    down: Product


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Kept:
    """Keys and values of a layer, and how queries attend to them (see ``decode_attention``).

    ``results`` are where to leave what the layer's products make, in their order; empty: nowhere.
    """

    prompt_keys: Float[Tensor, "P K W D"]
    prompt_values: Float[Tensor, "P K W D"]
    own_keys: Float[Tensor, "S K C D"]
    own_values: Float[Tensor, "S K C D"]
    scaling: float
    window: int | None
    results: Sequence[Float[Tensor, "N _"]] = ()


_RESULTS = ("packed", "attended", "gates", "update")


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("rows", "width", "heads", "key_heads", "head_width", "inner")
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("epsilon", ctypes.c_double)]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("panels", "bias", "down", "up")),
        ("rank", ctypes.c_int64),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("before_attention", "of_query", "of_key", "before_mlp")),
        *((name, _Product) for name in ("query_key_value", "out", "gate_up", "down")),
        *(
            (name, ctypes.c_void_p)
            for name in ("prompt_keys", "prompt_values", "own_keys", "own_values", *_RESULTS)
        ),
        *((name, ctypes.c_int64) for name in ("prompt_columns", "own_columns", "window")),
        ("scaling", ctypes.c_double),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("cosine", "sine", "place", "prompt_length", "own_length")
    ]


@final
class DecodeLayers:
    """The layers of a model; see ``can_decode``.

    Args:
        layers: their weights; not copied, so they must stay where they are.
        last: the norm after them.
        dtype: of products, and of keys and values.
    """

    def __init__(self, layers: Sequence[DecodeLayer], last: NormWeight, dtype: torch.dtype) -> None:
        assert can_decode(layers, dtype), "only for what can_decode"
        self._kept_alive = (layers, last)
        self._dtype = dtype
        self._layers = (_Layer * len(layers))(*map(_layer, layers))
        self._last = _norm(last)
        self._inner = _own(layers[0].down).panels.inner
        self._mixed = _own(layers[0].out).panels.inner
        self.widths = [_widths(layer) for layer in layers]
        """Of the results of each layer's four products."""

    def step(
        self,
        hidden: Float[Tensor, "N E"],
        turn: tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]],
        kept: Sequence[Kept],
        *,
        place: Int[Tensor, "N"],
        prompt_length: Int[Tensor, "N"],
        own_length: Int[Tensor, "N"],
    ) -> Float[Tensor, "N E"]:
        """Normed hidden states after all layers; new keys and values are written to ``kept``.

        Args:
            hidden: the residual stream, in float32 or in the products' type; it is overwritten.
            turn: cosine and sine of the rotary embedding, in float32.
            kept: of each layer.
            place: the row's prompt.
            prompt_length: its length.
            own_length: the row's own tokens, the present one not counted.

        Raises:
            MemoryError: there is not enough for what lies between the layers.
        """
        indices, out = (
            (place, prompt_length, own_length),
            torch.empty_like(hidden, dtype=self._dtype),
        )
        assert all(x.is_contiguous() for x in (hidden, *turn, *indices)), "buffers are whole"
        assert all(x.dtype == torch.float32 for x in turn), "angles are float32"
        assert all(x.dtype == torch.int64 for x in indices), "indices are int64"
        assert turn[0].shape[1] % 2 == 0, "halves of a head are rotated"
        if not len(hidden):
            return out
        for layer, there in zip(self._layers, kept, strict=True):
            assert len(there.own_keys) >= len(hidden), "a slot for every row"
            _point(layer, there, self._dtype)
            _leave(layer, there.results, len(hidden), self._dtype)
        key_heads, width = kept[0].own_keys.shape[1], turn[0].shape[1]
        sizes = _Sizes(*hidden.shape, self._mixed // width, key_heads, width, self._inner)
        rows = _Rows(*(x.data_ptr() for x in (*turn, *indices)))
        run = kernel(
            f"decode_step_{TYPES[hidden.dtype]}_{TYPES[self._dtype]}", "pippppp", ctypes.c_int64
        )
        addresses = (ctypes.addressof(x) for x in (sizes, self._layers, rows, self._last))
        first, *others = addresses
        run(first, len(kept), *others, hidden.data_ptr(), out.data_ptr())
        return out


def can_decode(layers: Sequence[DecodeLayer], dtype: torch.dtype) -> bool:
    """Whether ``DecodeLayers`` takes them: numbers are read in pairs, so widths are even."""
    products = [p for x in layers for p in (x.query_key_value, x.out, x.gate_up, x.down)]
    return can_multiply(dtype) and all(
        isinstance(p, PanelProduct)
        and all(
            panels.data.dtype == dtype and panels.inner % 2 == 0
            for panels in (p.panels, *(p.beside or ()))
        )
        for p in products
    )


def _point(layer: _Layer, kept: Kept, dtype: torch.dtype) -> None:
    """Where the layer's keys and values are now."""
    buffers = (kept.prompt_keys, kept.prompt_values, kept.own_keys, kept.own_values)
    assert all(x.is_contiguous() for x in buffers), "buffers are whole"
    assert all(x.dtype == dtype for x in buffers), "one type of numbers"
    layer.prompt_keys, layer.prompt_values, layer.own_keys, layer.own_values = (
        x.data_ptr() for x in buffers
    )
    layer.prompt_columns, layer.own_columns = kept.prompt_keys.shape[2], kept.own_keys.shape[2]
    layer.window, layer.scaling = kept.window or 0, kept.scaling


def _leave(layer: _Layer, results: Sequence[Tensor], rows: int, dtype: torch.dtype) -> None:
    """Where the layer's products leave what they make."""
    assert all(x.is_contiguous() and x.dtype == dtype for x in results), "as results are made"
    assert all(len(x) == rows for x in results), "a row of results for each"
    for name, there in zip_longest(_RESULTS, results):
        setattr(layer, name, None if there is None else there.data_ptr())


def _layer(layer: DecodeLayer) -> _Layer:
    norms = (layer.before_attention, *layer.head_norms, layer.before_mlp)
    products = (layer.query_key_value, layer.out, layer.gate_up, layer.down)
    return _Layer(*map(_norm, norms), *map(_product, products))


def _norm(norm: NormWeight | HeadNorm | None) -> _Norm:
    return _Norm(None, 0.0) if norm is None else _Norm(norm[0].data_ptr(), norm[1])


def _widths(layer: DecodeLayer) -> list[int]:
    """Of the results of the layer's products, in the order of ``_RESULTS``."""
    products = (layer.query_key_value, layer.out, layer.gate_up, layer.down)
    return [_own(product).panels.columns for product in products]


def _product(product: Product) -> _Product:
    own = _own(product)
    bias = None if own.bias is None else own.bias.data_ptr()
    if own.beside is None:
        return _Product(own.panels.data.data_ptr(), bias)
    down, up = own.beside
    pair = (down.data.data_ptr(), up.data.data_ptr())
    return _Product(own.panels.data.data_ptr(), bias, *pair, down.columns)


def _own(product: Product) -> PanelProduct:
    assert isinstance(product, PanelProduct), "only for what can_decode"
    return product
