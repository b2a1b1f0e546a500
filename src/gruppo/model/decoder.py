"""The parts of a pre-norm decoder of Llama's kind, found by the names and types of its modules.

Llama, SmolLM, Mistral, Qwen 2 and Qwen 3 are built like that, with an adapter or without. What is
found here only looks like such a decoder: that it computes like one is for those to find out who
compute it otherwise (``decoder_pass.py`` in training, the local engine in sampling).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gruppo.model.adapter import LowRank, base_model, find_low_rank

Group = tuple[nn.Linear, ...]
"""Layers that read the same rows."""
_MODEL = {"model", "lm_head"}
_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """An RMS norm: its weight and what it adds to the mean of squares."""

    weight: nn.Parameter
    epsilon: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Layer:
    """One layer: attention and gated linear unit, a norm before each.

    ``scaling`` multiplies the scores of attention; None if the module does not say. ``adapters``
    are those of its linear layers that have one that is switched on.
    """

    before_attention: Norm
    query_key_value: Group
    scaling: float | None
    head_norms: tuple[Norm | None, Norm | None]
    out: Group
    before_mlp: Norm
    gate_up: Group
    down: Group
    adapters: Mapping[nn.Linear, LowRank]

    @property
    def joints(self) -> tuple[Group, Group, Group, Group]:
        """The linear layers, by what they read."""
        return self.query_key_value, self.out, self.gate_up, self.down

    def parameters(self) -> list[Tensor]:
        """Weights and biases, those of adapters last."""
        linears = [layer for joint in self.joints for layer in joint]
        norms = (self.before_attention, self.before_mlp, *self.head_norms)
        return [
            *(norm.weight for norm in norms if norm is not None),
            *(parameter for layer in linears for parameter in layer.parameters()),
            *(weight for adapter in self.adapters.values() for weight in adapter.weights),
        ]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Decoder:
    """A causal language model: embedding, layers, a last norm and the head."""

    embedding: nn.Embedding
    rotary: nn.Module
    layers: tuple[Layer, ...]
    norm: Norm
    head: Group

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of all parameters, but for frozen matrices in bfloat16; None for several."""
        inner = [parameter for layer in self.layers for parameter in layer.parameters()]
        outer = [self.norm.weight, *(layer.weight for layer in self.head)]
        kind = self.embedding.weight.dtype
        is_one = all(p.dtype == kind or _is_cast(p) for p in (*inner, *outer))
        return kind if is_one else None

    @property
    def marks(self) -> tuple[float, ...]:
        """Where the weights are, how often they were changed in place, and adapters' scales.

        Of two equal ones the weights are the same, unless they were changed through ``.data``.
        """
        layers = [parameter for layer in self.layers for parameter in layer.parameters()]
        scales = [adapter.scale for layer in self.layers for adapter in layer.adapters.values()]
        every = (self.embedding.weight, *layers)
        places = (mark for weight in every for mark in (weight.data_ptr(), weight._version))
        return *places, *scales

    @property
    def together(self) -> list[Group]:
        """Layers that read the same rows."""
        return [group for layer in self.layers for group in (layer.query_key_value, layer.gate_up)]


def _is_cast(parameter: Tensor) -> bool:
    """Whether it may have been cast to what products are in (see ``precision.py``)."""
    return parameter.dtype == torch.bfloat16 and parameter.ndim == 2 and not parameter.requires_grad


class _Unlike(Exception):
    """The model is built in another way."""


def find_decoder(model: nn.Module, *, device: str = "cpu") -> Decoder | None:
    """The parts of ``model``, which is on ``device``.

    None if it has others, or more, or if anything is hooked onto it.
    """
    try:
        _expect({p.device.type for p in model.parameters()} == {device})
        for module in model.modules():
            _expect(
                not (module._forward_hooks or module._forward_pre_hooks)
                and "forward" not in vars(module)
            )
        return _decoder(base_model(model))
    except _Unlike:
        return None


def _decoder(model: nn.Module) -> Decoder:
    top = _children(model, _MODEL)
    body = _children(top["model"], _BODY)
    embedding, layers = body["embed_tokens"], body["layers"]
    _expect(type(embedding) is nn.Embedding and embedding.max_norm is None)
    _expect(type(layers) is nn.ModuleList)
    assert isinstance(embedding, nn.Embedding)
    return Decoder(
        embedding=embedding,
        rotary=body["rotary_emb"],
        layers=tuple(_layer(layer) for layer in layers.children()),
        norm=_norm(body["norm"]),
        head=_linears(top, "lm_head", adapters=None),
    )


def _layer(module: nn.Module) -> Layer:
    parts = _children(module, _LAYER)
    attention = _children(parts["self_attn"], _ATTENTION, _HEAD_NORMS)
    mlp = _children(parts["mlp"], _MLP)
    activation = mlp["act_fn"]
    points = torch.linspace(-9, 9, 64)
    _expect(torch.equal(activation(points), nn.functional.silu(points)))
    scaling = vars(parts["self_attn"]).get("scaling")
    query, key = (_norm(attention[n]) if n in attention else None for n in ("q_norm", "k_norm"))
    adapters: dict[nn.Linear, LowRank] = {}
    return Layer(
        before_attention=_norm(parts["input_layernorm"]),
        query_key_value=_linears(attention, "q_proj", "k_proj", "v_proj", adapters=adapters),
        scaling=scaling if isinstance(scaling, float) else None,
        head_norms=(query, key),
        out=_linears(attention, "o_proj", adapters=adapters),
        before_mlp=_norm(parts["post_attention_layernorm"]),
        gate_up=_linears(mlp, "gate_proj", "up_proj", adapters=adapters),
        down=_linears(mlp, "down_proj", adapters=adapters),
        adapters=adapters,
    )


def _children(
    module: nn.Module, names: set[str], optional: set[str] | None = None
) -> dict[str, nn.Module]:
    """The modules that ``module`` is made of, if they have these names and it has no weights."""
    children = dict(module.named_children())
    _expect(names <= set(children) <= names | (optional or set()))
    _expect(not [*module.parameters(recurse=False)])
    return children


def _linears(
    modules: dict[str, nn.Module], *names: str, adapters: dict[nn.Linear, LowRank] | None
) -> Group:
    """Linear layers, whose adapters are added to ``adapters`` (None: they must have none)."""
    group = []
    for name in names:
        layer, module = modules[name], modules[name]
        if adapters is not None and (found := find_low_rank(module)) is not None:
            layer, low_rank = found
            if low_rank is not None:
                adapters[found[0]] = low_rank
        _expect(type(layer) is nn.Linear)
        assert isinstance(layer, nn.Linear)
        group.append(layer)
    return tuple(group)


def _norm(module: nn.Module) -> Norm:
    weights: dict[str, nn.Parameter] = dict(module.named_parameters())
    epsilon = vars(module).get("variance_epsilon")
    _expect(set(weights) == {"weight"} and isinstance(epsilon, float))
    assert isinstance(epsilon, float)
    return Norm(weights["weight"], epsilon)


def _expect(truth: bool) -> None:
    if not truth:
        raise _Unlike
