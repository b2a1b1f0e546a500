"""A training pass of a packed row through a decoder of Llama's kind, in few calls a layer.

Transformers' own forward takes some seventy small operations a layer, and autograd as many more on
the way back; on a CPU they cost as much as a third of the products. Here a layer is one node of
automatic differentiation: joint products for what reads the same rows, compiled kernels for all
between them (``native/training.cpp``), and the gradient by hand. It follows the rounding of
autocast. It serves packed rows on the CPU with plain attention; every other model, and a machine
without a compiler, takes transformers' forward, which is the tested equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gruppo import native
from gruppo.model.decoder import Decoder, Group, Layer, find_decoder
from gruppo.model.packing import Packing
from gruppo.model.parts import text_config
from gruppo.model.products import current_products, multiplying
from gruppo.model.rectangle import Products as Rectangles
from gruppo.model.segments import Part, attend, attend_backward, cut

_NUMBERS = (torch.float32, torch.bfloat16)


def find_pass(model: nn.Module, *, device: str = "cpu") -> Decoder | None:
    """The parts of a model whose packed rows can go this way as far as can be seen; else None.

    Found anew for every pass: an adapter or a hook may have come. ``device`` "meta" asks what
    would be on the CPU.
    """
    decoder = find_decoder(model, device=device)
    if decoder is None or native.kernels() is None:
        return None
    known = text_config(model).to_dict()
    windows = known.get("sliding_window") and known.get("use_sliding_window", True)
    kinds = set(known.get("layer_types") or ())
    norms = [n for x in decoder.layers for n in (x.before_attention, x.before_mlp)] + [decoder.norm]
    linears = [
        module
        for x in decoder.layers
        for module in (*x.query_key_value, *x.out, *x.gate_up, *x.down)
    ]
    plain = (
        not windows
        and kinds <= {"full_attention"}
        and not known.get("attention_dropout")
        and all(layer.head_norms == (None, None) for layer in decoder.layers)
        and decoder.embedding.weight.dtype == torch.float32
        and all(norm.weight.dtype == torch.float32 for norm in norms)
        and all(module.weight.dtype in _NUMBERS for module in linears)
    )
    return decoder if plain else None


def decoder_states(decoder: Decoder, packing: Packing) -> Float[Tensor, "M E"]:
    """Hidden states after the last norm, at the positions that predict completion tokens."""
    half = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if half else torch.float32
    hidden = decoder.embedding(packing.ids)
    with torch.autocast("cpu", enabled=False):
        rows = _Row.of(decoder, packing, hidden, dtype)
        for layer in decoder.layers:
            hidden = _Layer.apply(hidden, rows, _Plan.of(layer), *layer.parameters())
        states, norm = hidden[packing.source], decoder.norm
        return nn.functional.rms_norm(states, states.shape[1:], norm.weight, norm.epsilon)


def kept_bytes(decoder: Decoder, packing: Packing, *, dtype: torch.dtype, head_width: int) -> int:
    """What a pass keeps for its backward pass; matrices are joint copies but where one is whole."""
    rows, total, width = len(packing.ids), 0, decoder.embedding.embedding_dim
    for layer in decoder.layers:
        inner = layer.down[0].in_features
        packed = sum(module.out_features for module in layer.query_key_value)
        mixed = layer.out[0].in_features
        # float32: two residual streams, a factor of each norm, a log-sum-exp a head
        wide = 2 * width + 2 + mixed // head_width
        total += rows * (dtype.itemsize * (packed + mixed + 2 * inner) + 4 * wide)
        for group in (layer.query_key_value, layer.out, layer.gate_up, layer.down):
            if len(group) > 1 or group[0].weight.dtype != dtype:
                total += dtype.itemsize * sum(module.weight.numel() for module in group)
    return total + len(packing.source) * 4 * (2 * width + 1)  # of the last norm


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Row:
    """What all layers need to know of a packed row."""

    parts: tuple[Part, ...]
    cosine: Float[Tensor, "N D"]
    sine: Float[Tensor, "N D"]
    dtype: torch.dtype

    @classmethod
    def of(cls, decoder: Decoder, packing: Packing, hidden: Tensor, dtype: torch.dtype) -> _Row:
        with torch.no_grad():
            turns = decoder.rotary(hidden[None], packing.positions[None])
        cosine, sine = (part[0].float().contiguous() for part in turns)
        width = cosine.shape[1]
        heads = decoder.layers[0].query_key_value[0].out_features // width
        query = hidden.new_empty(1, heads, 0, width, dtype=dtype)
        return cls(parts=cut(packing.parts, query), cosine=cosine, sine=sine, dtype=dtype)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Plan:
    """A layer without its weights: how its parameters, in their order, make up the matrices."""

    epsilons: tuple[float, float]
    matrices: tuple[tuple[tuple[int, int | None], ...], ...]

    @classmethod
    def of(cls, layer: Layer) -> _Plan:
        """Of each joint matrix the places of its layers' weights and biases among parameters."""
        place = {id(parameter): at for at, parameter in enumerate(layer.parameters())}

        def places(group: Group) -> tuple[tuple[int, int | None], ...]:
            return tuple(
                (place[id(m.weight)], None if m.bias is None else place[id(m.bias)]) for m in group
            )

        groups = (layer.query_key_value, layer.out, layer.gate_up, layer.down)
        return cls(
            epsilons=(layer.before_attention.epsilon, layer.before_mlp.epsilon),
            matrices=tuple(places(group) for group in groups),
        )


class _Layer(torch.autograd.Function):
    """Attention and gated linear unit; the parameters come as ``Layer.parameters`` orders them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, row: _Row, plan: _Plan, *parameters: Tensor) -> Tensor:
        joint = [_Joint.of(matrix, parameters, row.dtype) for matrix in plan.matrices]
        query_key_value, out, gate_up, down = joint
        first, second = parameters[0].detach(), parameters[1].detach()
        _, normed, scale = native.norm_forward(
            hidden, None, first, epsilon=plan.epsilons[0], dtype=row.dtype
        )
        heads = _Heads.of(query_key_value(normed), row, query_key_value.sizes)
        mixed = normed.new_empty(len(hidden), out.matrix.shape[1])
        lse = attend(heads.way, row.parts, heads.view(mixed))
        between, normed, other = native.norm_forward(
            hidden, out(mixed), second, epsilon=plan.epsilons[1], dtype=row.dtype
        )
        gates = gate_up(normed)
        ctx.save_for_backward(
            *(hidden, scale, heads.query, heads.key, heads.value, mixed, lse, between, other),
            *(gates, first, second),
        )
        ctx.row, ctx.plan, ctx.joint, ctx.products = row, plan, joint, current_products()
        return between + down(native.swiglu(gates))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        hidden, scale, query, key, value, mixed, lse, between, other, gates, first, second = (
            ctx.saved_tensors
        )
        row: _Row = ctx.row
        query_key_value, out, gate_up, down = ctx.joint
        heads = _Heads(query, key, value)
        found = _Found(ctx.plan, ctx.needs_input_grad[3:])
        carry = grad_outputs[0].contiguous()
        with torch.autocast("cpu", enabled=False), multiplying(ctx.products):
            grad = carry.to(row.dtype)
            to_gates, opened = native.swiglu_backward(gates, down.back(grad))
            found.add(down, grad, opened)
            carry, grad, normed, found.norms[1] = native.norm_backward(
                between, second, other, gate_up.back(to_gates), carry
            )
            found.add(gate_up, to_gates, normed)
            given = heads.view(out.back(grad))
            found.add(out, grad, mixed)
            sums = attend_backward(heads.way, row.parts, given, out=heads.view(mixed), lse=lse)
            packed = native.join_heads(
                sums.query, sums.key, sums.value, row.cosine, row.sine, dtype=row.dtype
            )
            carry, _, normed, found.norms[0] = native.norm_backward(
                hidden, first, scale, query_key_value.back(packed), carry
            )
            found.add(query_key_value, packed, normed)
        return carry, None, None, *found.gradients()


@dataclass(frozen=True, slots=True, eq=False)
class _Joint:
    """Linear layers that read the same rows, as one; in the type of the products."""

    places: tuple[tuple[int, int | None], ...]
    sizes: tuple[int, ...]
    matrix: Float[Tensor, "O I"]
    bias: Float[Tensor, "O"] | None

    @classmethod
    def of(
        cls,
        places: tuple[tuple[int, int | None], ...],
        parameters: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> _Joint:
        weights = [parameters[at].detach() for at, _ in places]
        sizes = tuple(map(len, weights))
        matrix = weights[0]
        if len(weights) > 1 or matrix.dtype != dtype:
            matrix = matrix.new_empty(sum(sizes), matrix.shape[1], dtype=dtype)
            for part, weight in zip(matrix.split(sizes), weights, strict=True):
                part.copy_(weight)
        addends = [
            weight.new_zeros(len(weight)) if at is None else parameters[at].detach()
            for weight, (_, at) in zip(weights, places, strict=True)
        ]
        biased = any(at is not None for _, at in places)
        bias = torch.cat([addend.to(dtype) for addend in addends]) if biased else None
        return cls(places, sizes, matrix, bias)

    def __call__(self, rows: Tensor) -> Tensor:
        """The layers' results side by side."""
        return nn.functional.linear(rows, self.matrix, self.bias)

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of the rows."""
        return grad @ self.matrix


@dataclass(frozen=True, slots=True, eq=False)
class _Heads:
    """Rotated queries and keys, and values, by key head."""

    query: Float[Tensor, "K N R D"]
    key: Float[Tensor, "K N D"]
    value: Float[Tensor, "K N D"]

    @classmethod
    def of(cls, packed: Tensor, row: _Row, sizes: tuple[int, ...]) -> _Heads:
        """``packed`` holds them side by side, ``sizes`` numbers each."""
        key_heads = sizes[1] // row.cosine.shape[1]
        return cls(*native.split_heads(packed, row.cosine, row.sine, key_heads=key_heads))

    @property
    def way(self) -> Rectangles:
        """How to attend with them."""
        return Rectangles(self.query, self.key, self.value, self.query.shape[-1] ** -0.5)

    def view(self, rows: Float[Tensor, "N O"]) -> Float[Tensor, "K N R D"]:
        """What lies in ``rows`` head by head, ordered as the queries are."""
        key_heads, _, repeats, width = self.query.shape
        return rows.view(len(rows), key_heads, repeats, width).transpose(0, 1)


class _Found:
    """The gradients of a layer's parameters, as far as they are wanted."""

    def __init__(self, plan: _Plan, wanted: Sequence[bool]) -> None:
        self._wanted = wanted
        self._plan = plan
        self._by_place: dict[int, Tensor] = {}
        self.norms: list[Tensor | None] = [None, None]

    def add(self, joint: _Joint, grad: Tensor, rows: Tensor) -> None:
        """Those of linear layers, from the gradient of their result and the rows they took."""
        if any(self._wanted[at] for at, _ in joint.places):
            whole = (grad.t() @ rows).float()
            for (at, _), part in zip(joint.places, whole.split(joint.sizes), strict=True):
                self._by_place[at] = part
        if joint.bias is not None:
            for (_, at), part in zip(
                joint.places, grad.sum(0, dtype=torch.float32).split(joint.sizes), strict=True
            ):
                if at is not None:
                    self._by_place[at] = part

    def gradients(self) -> list[Tensor | None]:
        """One for each parameter; None where none is wanted."""
        every = {**self._by_place, 0: self.norms[0], 1: self.norms[1]}
        return [every.get(at) if wanted else None for at, wanted in enumerate(self._wanted)]
