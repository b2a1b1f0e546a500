"""A training pass of a packed row through a decoder of Llama's kind, in few calls a layer.

Transformers' own forward takes some seventy small operations a layer, and autograd as many more on
the way back; on a CPU they cost as much as a third of the products. Here a layer is one node of
automatic differentiation: joint products for what reads the same rows, compiled kernels for all
between them (``native/training.cpp``), and the gradient by hand. It follows the rounding of
autocast. It serves packed rows on the CPU with plain attention; every other model, and a machine
without a compiler, takes transformers' forward, which is the tested equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gruppo import native
from gruppo.model.activations import Known
from gruppo.model.casts import Casts
from gruppo.model.decoder import Decoder, Layer, find_decoder
from gruppo.model.gradient import give, give_rows
from gruppo.model.head_norms import HeadNorms
from gruppo.model.joint import are_apart
from gruppo.model.linears import Linears, Matrices
from gruppo.model.packing import Packing
from gruppo.model.parts import text_config
from gruppo.model.products import Products, choosing, current_products
from gruppo.model.segments import Segments, part_numbers

_PACKED, _ATTENDED, _GATES, _UPDATE = range(4)  # what comes of Layer.joints
_NUMBERS = (torch.float32, torch.bfloat16)
# Others have the same modules and compute otherwise (layers without rotation, other rotations,
# factors), which a few tokens through small weights need not show.
_KINDS = ("llama", "mistral", "qwen2", "qwen3")


def find_pass(model: nn.Module, *, device: str = "cpu") -> Decoder | None:
    """The parts of a model whose packed rows can go this way as far as can be seen; else None.

    Found anew for every pass: an adapter, a hook or gradient checkpointing may have come.
    ``device`` "meta" asks what would be on the CPU.
    """
    half = torch.is_autocast_enabled("cpu")
    products = torch.get_autocast_dtype("cpu") if half else torch.float32
    decoder = find_decoder(model, device=device)
    if decoder is None or native.kernels() is None or products not in _NUMBERS:
        return None
    config = text_config(model)
    known = config.to_dict()
    windows = known.get("sliding_window") and known.get("use_sliding_window", True)
    plain = (
        config.model_type in _KINDS
        and not windows
        and set(known.get("layer_types") or ()) <= {"full_attention"}
        and not known.get("attention_dropout")
        and all(_is_plain(layer) for layer in decoder.layers)
        and not (decoder.embedding.sparse or decoder.embedding.scale_grad_by_freq)
        and decoder.embedding.weight.dtype == decoder.norm.weight.dtype == torch.float32
        and not any(_is_watched(module) for module in model.modules())
    )
    return decoder if plain else None


def _is_plain(layer: Layer) -> bool:
    """Whether types are as they must be, and every parameter is used once."""
    parameters = layer.parameters()
    linears = [linear for joint in layer.joints for linear in joint]
    norms = [layer.before_attention, layer.before_mlp, *(x for x in layer.head_norms if x)]
    return (
        len(norms) in (2, 4)
        and layer.scaling is not None
        and len({id(parameter) for parameter in parameters}) == len(parameters)
        and all(p.dtype in _NUMBERS for module in linears for p in module.parameters())
        and all(norm.weight.dtype == torch.float32 for norm in norms)
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether anything waits for this module's own backward pass, or makes it forward again."""
    recomputes = bool(vars(module).get("gradient_checkpointing"))
    return recomputes or bool(module._backward_hooks or module._backward_pre_hooks)


def decoder_states(
    decoder: Decoder, packing: Packing, casts: Casts | None = None, known: Known | None = None
) -> Float[Tensor, "M E"]:
    """Hidden states after the last norm, at the positions that predict completion tokens.

    ``casts`` keeps what products are made of for the next pass over the same weights; ``known``
    holds results of products that need not be made.
    """
    half = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if half else torch.float32
    embedding = decoder.embedding
    with torch.autocast("cpu", enabled=False):
        hidden = _Embedding.apply(packing.ids, embedding.weight, embedding.padding_idx)
        if known is not None and known.dtype != dtype:
            known = None
        rows = _Row.of(decoder, packing, hidden, dtype, casts, known)
        for number, layer in enumerate(decoder.layers):
            hidden = _Layer.apply(hidden, rows, _Plan.of(layer, number), *layer.parameters())
        states, norm = hidden[packing.source], decoder.norm
        return nn.functional.rms_norm(states, states.shape[1:], norm.weight, norm.epsilon)


def kept_bytes(decoder: Decoder, packing: Packing, *, dtype: torch.dtype, head_width: int) -> int:
    """What a pass keeps for its backward pass, weights and their copies apart."""
    rows, width = len(packing.ids), decoder.embedding.embedding_dim
    total = rows * spared_bytes(decoder, dtype=dtype)
    for layer in decoder.layers:
        mixed = layer.out[0].in_features
        # float32: the residual stream, a norm's factor, a log-sum-exp a head
        total += rows * (dtype.itemsize * mixed + 4 * (width + 1 + mixed // head_width))
    return total + len(packing.source) * 4 * (2 * width + 1)  # of the last norm


def spared_bytes(decoder: Decoder, *, dtype: torch.dtype) -> int:
    """What of it a token does not take whose activations are known."""
    # a layer's last product is kept by nobody
    return sum(dtype.itemsize * sum(result_widths(layer)[:-1]) for layer in decoder.layers)


def result_widths(layer: Layer) -> list[int]:
    """Widths of what the products of a layer make, as ``Layer.joints`` orders them."""
    return [sum(module.out_features for module in joint) for joint in layer.joints]


def copied_bytes(decoder: Decoder, *, dtype: torch.dtype, products: Products) -> int:
    """What products take up beside the weights: kept joint copies, or the largest one's panels."""
    joints = [joint for layer in decoder.layers for joint in layer.joints] + [decoder.head]
    sizes = [sum(module.weight.numel() for module in joint) * dtype.itemsize for joint in joints]
    if products == "native":
        return max(*sizes, 2 * sizes[-1])  # of the head both ways, where logits are made again
    matrices = [[module.weight for module in joint] for joint in joints]
    as_they_are = [
        are_apart(joint, dtype) or (len(joint) == 1 and joint[0].dtype == dtype)
        for joint in matrices
    ]
    return sum(size for size, is_free in zip(sizes, as_they_are, strict=True) if not is_free)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Row:
    """What all layers need to know of a packed row."""

    parts: tuple[native.PartNumbers, ...]
    cosine: Float[Tensor, "N D"]
    sine: Float[Tensor, "N D"]
    dtype: torch.dtype
    casts: Casts | None
    known: Known | None

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        packing: Packing,
        hidden: Tensor,
        dtype: torch.dtype,
        casts: Casts | None,
        known: Known | None,
    ) -> _Row:
        with torch.no_grad():
            turns = decoder.rotary(hidden[None], packing.positions[None])
        cosine, sine = (part[0].float().contiguous() for part in turns)
        parts = part_numbers(packing.parts)
        return cls(parts=parts, cosine=cosine, sine=sine, dtype=dtype, casts=casts, known=known)

    def unknown(self, rows: Float[Tensor, "N I"]) -> Float[Tensor, "R I"]:
        """Those rows whose products are to be made."""
        return rows if self.known is None else rows[self.known.rest]

    def whole(self, made: Float[Tensor, "R O"], plan: _Plan, product: int) -> Float[Tensor, "N O"]:
        """The results ``made``, and those known."""
        return made if self.known is None else self.known.fill(made, plan.number, product)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A layer without its weights: its numbers, and the places of its parameters."""

    number: int
    epsilons: tuple[float, float]
    scaling: float
    mixed: int  # width of all heads' results
    head_norms: HeadNorms | None
    linears: tuple[Linears, ...]  # as Layer.joints has them

    @classmethod
    def of(cls, layer: Layer, number: int) -> _Plan:
        """For parameters in the order of ``Layer.parameters``."""
        place = {id(parameter): at for at, parameter in enumerate(layer.parameters())}
        assert layer.scaling is not None, "find_pass has looked"
        return cls(
            number=number,
            epsilons=(layer.before_attention.epsilon, layer.before_mlp.epsilon),
            scaling=layer.scaling,
            mixed=layer.out[0].in_features,
            head_norms=HeadNorms.of(layer),
            linears=tuple(Linears.of(joint, layer.adapters, place) for joint in layer.joints),
        )

    def matrices(self, parameters: Sequence[Tensor], row: _Row) -> Iterator[Matrices]:
        """Those of the linear layers, for one pass over ``row``."""
        return (linears.on(parameters, row.dtype, row.casts) for linears in self.linears)


class _Layer(torch.autograd.Function):
    """Attention and gated linear unit; the parameters come as ``Layer.parameters`` orders them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, row: _Row, plan: _Plan, *parameters: Tensor) -> Tensor:
        dtype = row.dtype
        query_key_value, out, gate_up, down = plan.matrices(parameters, row)
        first, second = parameters[0].detach(), parameters[1].detach()
        _, normed, scale = native.norm_forward(
            hidden, None, weight=first, epsilon=plan.epsilons[0], dtype=dtype
        )
        packed = query_key_value.forward(row.unknown(normed))
        heads = _Heads.of(row.whole(packed, plan, _PACKED), row, plan, parameters)
        mixed = normed.new_empty(len(hidden), plan.mixed)
        lse = heads.attention(row, plan).attend(heads.rows(mixed))
        update = out.forward(row.unknown(mixed))
        attended = row.whole(update, plan, _ATTENDED)
        between, normed, _ = native.norm_forward(
            hidden, attended, weight=second, epsilon=plan.epsilons[1], dtype=dtype
        )
        gates = gate_up.forward(row.unknown(normed))
        # parameters too, so that autograd sees changes in place
        ctx.save_for_backward(
            *(hidden, scale, packed, mixed, lse, update, gates),
            *parameters,
        )
        ctx.row, ctx.plan, ctx.products, ctx.parameters = row, plan, current_products(), parameters
        return between + row.whole(down.forward(native.swiglu(gates)), plan, _UPDATE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        hidden, scale, packed, mixed, lse, update, gates, first, second, *_ = ctx.saved_tensors
        # not what was saved of the parameters: another tensor may have come back
        row, plan, parameters = ctx.row, ctx.plan, ctx.parameters
        found = _Found(parameters, ctx.needs_input_grad[3:])
        carry = grad_outputs[0].contiguous()
        with torch.autocast("cpu", enabled=False), choosing(ctx.products):
            query_key_value, out, gate_up, down = plan.matrices(parameters, row)
            grad = carry.to(row.dtype)
            gates = row.whole(gates, plan, _GATES)
            to_gates, opened = native.swiglu_backward(gates, down.backward(grad))
            del gates
            found.add(down, grad, opened)
            # made again: it is as large as all heads together
            attended = row.whole(update, plan, _ATTENDED)
            between, _, other = native.norm_forward(
                hidden, attended, weight=second, epsilon=plan.epsilons[1], dtype=row.dtype
            )
            carry, grad, normed, of_norm = native.norm_backward(
                between,
                second,
                scale=other,
                grad=gate_up.backward(to_gates),
                carry=carry,
            )
            found.add_norm(1, of_norm)
            found.add(gate_up, to_gates, normed)
            given = out.backward(grad)
            found.add(out, grad, mixed)
            # made again: side by side they are what norms of heads take, too
            packed = row.whole(packed, plan, _PACKED)
            heads = _Heads.of(packed, row, plan, parameters)
            attention = heads.attention(row, plan)
            sums = attention.backward(heads.rows(given), out=heads.rows(mixed), lse=lse)
            grad = native.join_heads(
                sums.query, sums.key, sums.value, row.cosine, row.sine, dtype=row.dtype
            )
            if plan.head_norms is not None:
                grad, of_weights = plan.head_norms.backward(packed, grad, parameters)
                for place, of_norm in of_weights.items():
                    found.add_norm(place, of_norm)
            carry, _, normed, of_norm = native.norm_backward(
                hidden,
                first,
                scale=scale,
                grad=query_key_value.backward(grad),
                carry=carry,
            )
            found.add_norm(0, of_norm)
            found.add(query_key_value, grad, normed)
        return carry, None, None, *found.gradients()


@dataclass(frozen=True, slots=True, eq=False)
class _Heads:
    """Rotated queries and keys, and values, by key head."""

    query: Float[Tensor, "K N R D"]
    key: Float[Tensor, "K N D"]
    value: Float[Tensor, "K N D"]

    @classmethod
    def of(cls, packed: Tensor, row: _Row, plan: _Plan, parameters: Sequence[Tensor]) -> _Heads:
        """``packed`` holds them side by side, as the products made them."""
        if plan.head_norms is not None:
            packed = plan.head_norms.forward(packed, parameters)
        key_heads = plan.linears[0].sizes[1] // row.cosine.shape[1]
        return cls(*native.split_heads(packed, row.cosine, row.sine, key_heads=key_heads))

    def attention(self, row: _Row, plan: _Plan) -> Segments:
        """Over the row's parts."""
        pattern = native.Pattern(row.parts, plan.scaling)
        return Segments(self.query, self.key, self.value, pattern)

    def rows(self, flat: Float[Tensor, "N O"]) -> Float[Tensor, "N H D"]:
        """What lies in ``flat`` head by head."""
        return flat.view(len(flat), -1, self.query.shape[-1])


class _Found:
    """The gradients of a layer's parameters, as far as they are wanted."""

    def __init__(self, parameters: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        self._parameters, self._wanted = parameters, wanted
        self._by_place: dict[int, Tensor | None] = {}

    def add_norm(self, place: int, grad: Tensor) -> None:
        """That of a norm's weight."""
        self._give(place, grad)

    def add(self, matrices: Matrices, grad: Tensor, rows: Tensor) -> None:
        """Those of linear layers, from the gradient of their result and the rows they took."""
        self._by_place.update(matrices.gradients(grad, rows, self._wanted))

    def gradients(self) -> list[Tensor | None]:
        """One for each parameter; None where none is wanted, or where it has been added."""
        return [self._by_place[at] if wanted else None for at, wanted in enumerate(self._wanted)]

    def _give(self, place: int, grad: Tensor) -> None:
        if self._wanted[place]:
            self._by_place[place] = give(self._parameters[place], grad)


class _Embedding(torch.autograd.Function):
    """Rows of a matrix; that of the padding token gets no gradient, as in torch's own module."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        (ids,), (grad,) = ctx.saved_tensors, grad_outputs
        if ctx.padding is not None:
            trained = ids != ctx.padding
            ids, grad = ids[trained], grad[trained]
        return None, give_rows(ctx.weight, ids, grad), None
