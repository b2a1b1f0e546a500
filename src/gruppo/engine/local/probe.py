"""Whether a model draws the same with shared prompts as plainly: tried, on a few tokens.

Models that keep another state than keys and values (state spaces, linear attention), whose
attention is not gruppo's, or whose forward takes no layout, do not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gruppo.engine.local.module import generating
from gruppo.engine.local.schedule import Schedule, rows_of
from gruppo.engine.local.shared import Drawing
from gruppo.engine.local.store import Store
from gruppo.memory import is_out_of_memory
from gruppo.model.attention import NAME
from gruppo.model.parts import causal, text_config
from gruppo.types import Request, Sampling

# Largest difference of a log-probability that rounding can explain.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # both are drawn in float32
_HALF_TOLERANCE = 0.3
_PROMPTS = ((5, 6, 7, 8), (9, 10))
_TOKENS = 5


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
