"""What a training forward keeps for its backward pass, counted without doing it.

The model is built of fake tensors: shapes and types without memory. Its forward runs as ever, and
every tensor that autograd saves is counted once, so the number is right for any architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, masking_utils

from gruppo.model.adapter import Lora, attach
from gruppo.model.attention import NAME
from gruppo.model.decoder_pass import (
    copied_bytes,
    find_pass,
    kept_bytes,
    result_widths,
    spared_bytes,
)
from gruppo.model.head import logit_rule
from gruppo.model.logprob import packed_states, pad, padded_states
from gruppo.model.packing import Packing, pack
from gruppo.model.parts import causal, embedding, text_config
from gruppo.model.precision import frozen_bytes
from gruppo.model.products import Products
from gruppo.model.source import checkpoint_activations, locate, quiet
from gruppo.model.thrift import remade
from gruppo.native import kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of a model and of one forward and backward pass.

    ``weights`` counts tied ones once, ``trainable`` those that get a gradient, ``largest`` the
    largest trainable matrix, ``frozen`` a frozen copy. ``linears`` are the matrices of linear
    layers (the head too, tied or not). ``saved`` is what autograd keeps of a forward, ``copies``
    what products hold of the weights beside them (0 where ``saved`` has it), ``vocabulary`` the
    size of one position's logits in float32, ``logits`` of those that are kept for the backward
    pass. ``results`` is what a drawn token's activations take where they can be kept, else 0, and
    ``spared`` what a pass whose completions are known by them keeps less.
    """

    weights: int
    trainable: int
    largest: int
    frozen: int
    linears: int
    saved: int
    copies: int
    head: int
    vocabulary: int
    logits: int
    num_layers: int
    cache_per_token: int
    results: int = 0
    spared: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One pass: prompts of these lengths, each with completions of these."""

    prompts: Sequence[int]
    completions: Sequence[Sequence[int]]

    @classmethod
    def even(cls, *, prompts: Sequence[int], group: int, completion: int) -> Shape:
        """``group`` completions of one length to each prompt."""
        return cls(prompts=prompts, completions=[[completion] * group] * len(prompts))

    @property
    def positions(self) -> int:
        """Completion tokens: what the head predicts."""
        return sum(map(sum, self.completions))

    def packed(self) -> Packing:
        """One row. Every prompt differs in its first token: equal neighbours would be one."""
        return pack(*self._rows())

    def padded(self) -> tuple[Tensor, Tensor]:
        """A row for every completion, its prompt before it: see ``logprob.pad``."""
        return pad(*self._rows())

    def _rows(self) -> tuple[list[tuple[int, ...]], Tensor, list[int]]:
        rows: list[tuple[int, ...]] = [
            (number, *range(1, length))
            for number, (length, group) in enumerate(
                zip(self.prompts, self.completions, strict=True)
            )
            for _ in group
        ]
        counts = [length for group in self.completions for length in group]
        return rows, torch.zeros(len(rows), max(counts), dtype=torch.long), counts


def footprint(  # noqa: PLR0913 - a model, and what decides how it is computed
    name: str,
    shape: Shape,
    *,
    revision: str | None = None,
    lora: Lora | None = None,
    compute: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    thrift: bool = True,
    products: Products = "torch",
    packed: bool = True,
) -> Footprint:
    """Count for a forward of ``shape`` through the model ``name``.

    ``thrift``: as on a CPU, where ``thrift.py`` makes tensors again, and ``decoder_pass.py`` keeps
    what it needs alone; ``products`` are those of that pass. Without ``packed`` every completion
    goes forward behind its own prompt, by the model's own modules.

    Raises:
        ValueError, OSError: the model's configuration cannot be had.
    """
    with quiet():
        config = AutoConfig.from_pretrained(
            locate(name), revision=revision, trust_remote_code=False
        )
    with torch.device("meta"), quiet():
        model = _skeleton(config, lora, compute, gradient_checkpointing)
    decoder = find_pass(model, device="meta") if thrift and packed else None
    if decoder is not None:
        known = {id(p): p for p in model.parameters()}
        width = _head_width(text_config(model))
        kept = kept_bytes(decoder, shape.packed(), dtype=compute, head_width=width)
        copies = copied_bytes(decoder, dtype=compute, products=products)
        counted = _count(model, known, compute, saved=kept, copies=copies, thrift=thrift)
        if products != "native":
            return counted
        widths = [sum(result_widths(layer)) for layer in decoder.layers]
        tokens = sum(max(count - 1, 0) for group in shape.completions for count in group)
        return replace(
            counted,
            results=sum(widths) * compute.itemsize,
            spared=tokens * spared_bytes(decoder, dtype=compute),
        )
    layout, padded = shape.packed(), shape.padded()  # here: real numbers, no fake ones
    with FakeTensorMode(allow_non_fake_inputs=True):
        _pretend(model)
        weights = {_key(p): p for p in model.parameters()}
        states = (
            partial(packed_states, model, layout)
            if packed
            else partial(padded_states, model, *padded)
        )
        half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == torch.bfloat16)
        with half, _one_sequence_a_row():
            saved = _saved(states, set(weights), thrift=thrift)
    return _count(model, weights, compute, saved=saved, copies=0, thrift=thrift)


def _no_sequences(position_ids: Tensor) -> None:
    del position_ids


@contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """Transformers reads positions to see whether a row holds several; fake ones cannot be read.

    Rows that it would ask about hold one: as it finds in a real pass, which needs no mask then.
    """
    real = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _no_sequences
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = real


def _saved(work: Callable[[], Tensor], weights: set[int], *, thrift: bool) -> int:
    """Bytes that autograd keeps of ``work``, weights apart."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _key(tensor) not in weights and not (thrift and remade(tensor)):
            saved[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        made = work()  # alive: storages that are freed give their keys to others
    del made
    return sum(saved.values())


def _skeleton(
    config: PreTrainedConfig, lora: Lora | None, compute: torch.dtype, checkpointing: bool
) -> nn.Module:
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_attn_implementation(NAME)
    if checkpointing:
        checkpoint_activations(model)
    if lora is not None:
        model = attach(model, lora, compute_dtype=compute)
    return model.train()


def _pretend(model: nn.Module) -> None:
    """Put fake tensors on the CPU in place of meta ones, so that a CPU's kernels are chosen."""
    known: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                new = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
                module._parameters[name] = known.setdefault(id(p), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _count(
    model: nn.Module,
    weights: dict[int, nn.Parameter],
    compute: torch.dtype,
    *,
    saved: int,
    copies: int,
    thrift: bool,
) -> Footprint:
    config = text_config(model)
    trainable = [p for p in weights.values() if p.requires_grad]
    linears = {id(m.weight): m.weight for m in model.modules() if type(m) is nn.Linear}
    heads = config.num_key_value_heads if "num_key_value_heads" in config.to_dict() else None
    heads = heads or config.num_attention_heads
    width = _head_width(config)
    item = 2 if compute == torch.bfloat16 else 4
    rows, output = len(embedding(model)), causal(model).get_output_embeddings()
    rule = logit_rule(model, 1.0)
    narrow = thrift and output.bias is None and rule.softcap is None and kernels() is not None
    return Footprint(
        weights=sum(p.nbytes for p in weights.values()),
        trainable=sum(p.nbytes for p in trainable),
        largest=max(p.nbytes for p in trainable),
        frozen=frozen_bytes(model, compute),
        linears=sum(w.numel() * item for w in linears.values()),
        saved=saved,
        copies=copies,
        head=output.weight.nbytes,
        vocabulary=rows * 4,
        logits=rows * (item if narrow else 4),
        num_layers=config.num_hidden_layers,
        cache_per_token=2 * config.num_hidden_layers * heads * width * item,
    )


def _head_width(config: PreTrainedConfig) -> int:
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
