"""A decode step in few calls: packed products, and compiled kernels for all between them.

Transformers' own forward takes some seventy small operations a layer, which on a CPU can cost as
much as the products. This one takes nine, or, where the own kernels multiply too, one call for all
layers. It follows the model's own rounding, knows no prompt (transformers' forward computes those)
and no gradient, and serves only decoders of Llama's kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gruppo import native
from gruppo.engine.local.packed import Product, Products
from gruppo.engine.local.store import Decode, Store
from gruppo.model.activations import Activations, LayerResults
from gruppo.model.adapter import LowRank
from gruppo.model.decoder import Decoder, Group, Layer, Norm
from gruppo.model.low_rank import LowRanks

_Norm = tuple[Tensor, float]


@final
class FusedStep:
    """One decode step of a recognised model, for one call of ``generate``.

    Args:
        decoder: the model's parts.
        products: with the matrices of a group of its layers.
        store: where the keys and values are; the prompts were computed into it.
        activations: take what the layers' products make, where one call does all layers.
    """

    def __init__(
        self,
        decoder: Decoder,
        products: Products,
        store: Store,
        activations: Activations | None = None,
    ) -> None:
        self._store = store
        self._embedding = decoder.embedding
        self._rotary = decoder.rotary
        self._layers = [_layer(layer, products, store.dtype) for layer in decoder.layers]
        self._norm = _wide(decoder.norm)
        self._head = products(decoder.head)
        self._together = None
        self._results: Sequence[LayerResults] = ()
        if native.can_decode(self._layers, store.dtype):
            self._together = native.DecodeLayers(self._layers, self._norm, store.dtype)
            if activations is not None:
                widths = self._together.widths
                self._results = activations.layers(widths, store.dtype, decoder)
        self.keeps = bool(self._results)

    def __call__(
        self, tokens: Int[Tensor, "N"], positions: Int[Tensor, "N"], step: Decode
    ) -> Float[Tensor, "N V"]:
        """Logits after ``tokens``, whose keys and values are added to the store."""
        hidden = self._embedding(tokens)
        cosine, sine = (
            part[:, 0].float().contiguous() for part in self._rotary(hidden, positions[:, None])
        )
        for kept in self._store.layers:
            if step.columns > kept.own_keys.shape[2]:
                kept.reserve(columns=step.columns)
        if self._together is None:
            return self._head(self._one_by_one(hidden, (cosine, sine), step))
        normed = self._together.step(
            hidden,
            (cosine, sine),
            self._kept(step, len(hidden)),
            place=step.place,
            prompt_length=step.prompt_length,
            own_length=step.own_length,
        )
        return self._head(normed)

    def _kept(self, step: Decode, rows: int) -> list[native.Kept]:
        """Of every layer what there is, and where its results go."""
        layers, first = self._store.layers, step.kept_at
        if first is None:
            return [step.kept(layer) for layer in layers]
        here = slice(first, first + rows)
        return [
            step.kept(layer, [result[here] for result in results])
            for layer, results in zip(layers, self._results, strict=True)
        ]

    def _one_by_one(self, hidden: Tensor, turn: tuple[Tensor, Tensor], step: Decode) -> Tensor:
        """Normed hidden states after all layers, by a call for each operation."""
        update = None
        for layer, kept in zip(self._layers, self._store.layers, strict=True):
            packed = layer.query_key_value(self._normed(hidden, update, layer.before_attention))
            query = native.rotate_and_keep(
                packed,
                *turn,
                norms=layer.head_norms,
                own_length=step.own_length,
                own_keys=kept.own_keys,
                own_values=kept.own_values,
            )
            update = layer.out(step.attend_natively(kept, query, kept.rule).flatten(1))
            gate_up = layer.gate_up(self._normed(hidden, update, layer.before_mlp))
            update = layer.down(native.swiglu(gate_up))
        return self._normed(hidden, update, self._norm)

    def _normed(self, hidden: Tensor, update: Tensor | None, norm: _Norm) -> Tensor:
        weight, epsilon = norm
        return native.add_norm(hidden, update, weight, epsilon=epsilon, dtype=self._store.dtype)


def _layer(layer: Layer, products: Products, dtype: torch.dtype) -> native.DecodeLayer:
    query_key_value, out, gate_up, down = (
        _with_adapters(products(group), group, layer.adapters, dtype) for group in layer.joints
    )
    query, key = (None if norm is None else _wide(norm) for norm in layer.head_norms)
    return native.DecodeLayer(
        before_attention=_wide(layer.before_attention),
        query_key_value=query_key_value,
        head_norms=(query, key),
        out=out,
        before_mlp=_wide(layer.before_mlp),
        gate_up=gate_up,
        down=down,
    )


def _with_adapters(
    product: Product, group: Group, adapters: Mapping[nn.Linear, LowRank], dtype: torch.dtype
) -> Product:
    """``product``, and what the adapters of the group's layers add to it."""
    found = [adapters.get(layer) for layer in group]
    if not any(found):
        return product
    added = LowRanks(found, [layer.out_features for layer in group], dtype)
    if isinstance(product, native.PanelProduct):
        return replace(product, beside=added.cut())
    return lambda rows: product(rows).add_(added.forward(rows))


def _wide(norm: Norm) -> _Norm:
    """A norm's weight in float32, and its epsilon."""
    return norm.weight.detach().float().contiguous(), norm.epsilon
