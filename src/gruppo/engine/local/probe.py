"""Which of the engine's ways compute what a model computes: tried, on a few tokens.

Models that keep another state than keys and values (state spaces, linear attention), whose
attention is not gruppo's, or whose forward takes no layout, cannot share prompts. Those that
look like Llama and compute something else (scaled residuals, say) cannot take its short step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gruppo import native
from gruppo.engine.local.forward import forward
from gruppo.engine.local.fused import FusedStep
from gruppo.engine.local.module import generating
from gruppo.engine.local.packed import plain_product
from gruppo.engine.local.schedule import Schedule, rows_of
from gruppo.engine.local.shared import Advance, Drawing
from gruppo.engine.local.store import Decode, Piece, Prefill, Store
from gruppo.memory import is_out_of_memory
from gruppo.model.adapter import awake
from gruppo.model.attention import NAME
from gruppo.model.decoder import Decoder, find_decoder
from gruppo.model.parts import causal, context_length, text_config
from gruppo.types import Request, Sampling

# Largest difference of a log-probability that rounding can explain.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # both are drawn in float32
_HALF_TOLERANCE = 0.3
_PROMPTS = ((5, 6, 7, 8), (9, 10))
_TOKENS = 5
# Largest difference of logits, relative to their largest value, that rounding can explain.
_STEP_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_STEPS = 3


def can_share(model: nn.Module, compute_dtype: torch.dtype) -> bool:
    """Whether tokens drawn with shared prompts get a plain forward's log-probabilities."""
    if causal(model).config._attn_implementation != NAME or _hides_layout(model):
        return False
    config = text_config(model)
    prompts = [tuple(token % config.vocab_size for token in prompt) for prompt in _PROMPTS]
    requests = [Request(tokens=prompt, num_samples=2, key=(0,)) for prompt in prompts]
    sampling = Sampling(max_tokens=_TOKENS)
    with generating(model, compute_dtype) as dtype:
        kept = dtype or next(model.parameters()).dtype
        schedule = Schedule(rows_of(requests, [_TOKENS] * 2), requests, max_rows=3)
        drawing = Drawing(
            model,
            requests,
            schedule,
            sampling=sampling,
            store=Store(config.num_hidden_layers, slots=3, dtype=kept),
            spoken=None,
        )
        try:
            while not schedule.is_done:
                drawing.turn()
        except Exception as error:  # whatever a model's own code makes of such a cache
            if is_out_of_memory(error):
                raise
            return False
        tolerance = _TOLERANCE.get(kept, _HALF_TOLERANCE)
        return all(
            bool(
                (_plain_logp(model, prompts[row.request], drawn.tokens) - torch.tensor(drawn.logp))
                .abs()
                .max()
                <= tolerance
            )
            for row, drawn in drawing.drawn.items()
        )


def can_fuse(model: nn.Module, compute_dtype: torch.dtype) -> bool:
    """Whether ``FusedStep`` gives the logits of the model's own forward; for one that shares.

    Rows at positions all over the context are compared for a few steps, because some models
    scale queries far from the beginning.
    """
    decoder = find_decoder(model)
    if decoder is None or decoder.dtype is None or native.kernels() is None:
        return False
    with generating(model, compute_dtype) as dtype:
        kept = dtype or next(model.parameters()).dtype
        if kept not in _STEP_TOLERANCE:
            return False
        try:
            with awake(x for layer in decoder.layers for x in layer.adapters.values()):
                ours, theirs = (_stepped(model, kept, parts) for parts in (decoder, None))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            return False
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    return error <= _STEP_TOLERANCE[kept]


def _stepped(model: nn.Module, dtype: torch.dtype, decoder: Decoder | None) -> Tensor:
    """Logits [steps, N, V] of rows that share prompts, by the parts of a decoder or plainly."""
    config = text_config(model)
    store = Store(config.num_hidden_layers, slots=3, dtype=dtype)
    pieces, first = [], 0
    for place, prompt in enumerate(_PROMPTS):
        pieces.append(Piece(place=place, start=0, stop=len(prompt), first=first))
        first += len(prompt)
    ids = torch.tensor([token % config.vocab_size for prompt in _PROMPTS for token in prompt])
    at = torch.tensor([position for prompt in _PROMPTS for position in range(len(prompt))])
    forward(model, store, Prefill(store, tuple(pieces)), ids[None], at[None])

    def plain(tokens: Tensor, positions: Tensor, step: Decode) -> Tensor:
        return forward(model, store, step, tokens[:, None], positions[:, None])[:, -1]

    advance: Advance = FusedStep(decoder, plain_product, store) if decoder else plain
    places = (0, 1, 0)
    lengths = torch.tensor([len(_PROMPTS[place]) for place in places])
    step = Decode.of(store, places, lengths, torch.zeros(3, dtype=torch.long))
    far = (context_length(model) or 4096) - int(lengths.max()) - _STEPS
    offset = torch.tensor([0, far // 3, far]).clamp(min=0)
    logits = []
    for number in range(_STEPS):
        tokens = (torch.arange(3) * 7 + number * 3 + 11) % config.vocab_size
        logits.append(advance(tokens, step.positions + offset, step))
        step.advance()
    return torch.stack(logits).double()


def _hides_layout(model: nn.Module) -> bool:
    """Whether the mask or the rotation depends on more than a row's own positions and a window.

    A few tokens cannot show it: chunked attention begins beyond its chunk, and these rotations
    take their frequencies from the longest row of a batch.
    """
    known = text_config(model).to_dict()
    kinds = set(known.get("layer_types") or ())
    rope = known.get("rope_parameters") or known.get("rope_scaling") or {}
    tables = rope.values() if all(isinstance(v, dict) for v in rope.values()) else [rope]
    return (
        not kinds <= {"full_attention", "sliding_attention"}
        or known.get("attention_chunk_size") is not None
        or any(table.get("rope_type") in ("dynamic", "longrope") for table in tables)
    )


def _plain_logp(model: nn.Module, prompt: tuple[int, ...], tokens: list[int]) -> Tensor:
    """Log-probabilities of ``tokens`` [T] from one forward without a cache."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *tokens]], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    picked = torch.log_softmax(logits.float(), -1).gather(-1, ids[0, len(prompt) :, None])
    return picked[:, 0].cpu()
