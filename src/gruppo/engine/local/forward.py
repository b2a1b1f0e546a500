"""One forward of the model as the engine calls it: keys and values go where a step says."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gruppo.engine.local.store import Step, Store
from gruppo.model.attention import SHARED


def forward(
    model: nn.Module,
    store: Store,
    step: Step,
    tokens: Int[Tensor, "B Q"],
    positions: Int[Tensor, "B Q"],
    *,
    keep: Tensor | int = 1,
) -> Float[Tensor, "B K V"]:
    """Logits at the positions to ``keep`` (the last so many, or indices)."""
    store.step = step
    output = model(
        input_ids=tokens,
        position_ids=positions,
        # four dimensions: transformers takes it as it is, and makes no mask of its own
        attention_mask=torch.zeros(1, 1, 1, 1, device=tokens.device),
        past_key_values=store.cache,
        use_cache=True,
        logits_to_keep=keep,
        **{SHARED: step},
    )
    return output.logits
