"""Drawing in waves: the plain path, for any model that transformers can cache.

Rows are decoded in padded batches from which they leave as they end; every row holds its own copy
of its prompt's keys, and waiting rows start when a wave is over. It is what the fast path is
compared with, and what is left for models whose layers keep another kind of state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from gruppo.engine.local.batch import Prompts, Wave
from gruppo.engine.local.cache import cache_bytes, make_cache, select_rows
from gruppo.engine.local.schedule import Row
from gruppo.engine.local.shared import Drawn, Spoken
from gruppo.engine.sampler import sample
from gruppo.model.parts import causal
from gruppo.types import Request, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Waves:
    """What every wave of one call of ``generate`` shares.

    ``dtype`` is the type to keep keys and values in, None for the model's own.
    """

    model: nn.Module
    requests: Sequence[Request]
    sampling: Sampling
    pad_token: int
    dtype: torch.dtype | None
    spoken: Spoken | None

    def draw(self, rows: Sequence[Row]) -> tuple[dict[Row, Drawn], int]:
        """Draw all rows of one wave; what they drew, and the most bytes that its cache took."""
        device = next(self.model.parameters()).device
        prompts = Prompts.of(rows, self.requests, pad_token=self.pad_token, device=device)
        wave = Wave(rows, self.requests, prompts)
        ends = torch.tensor(self.sampling.stop_tokens, dtype=torch.long, device=device)
        cache = make_cache(causal(self.model).config, self.dtype)
        logits = _forward(self.model, prompts.tokens, prompts.mask, prompts.positions, cache=cache)
        select_rows(cache, prompts.source)
        logits = logits[prompts.source]
        peak = 0
        while True:
            token, logp = sample(logits, wave.uniforms(), self.sampling)
            wave.write(token, logp)
            stopped = (token[:, None] == ends).any(-1)
            if self.spoken is not None:
                stopped |= torch.tensor(self.spoken(wave.running()), device=device)
            keep = wave.retire(stopped)
            if keep is not None:
                peak = max(peak, cache_bytes(cache))  # it grows until rows leave
                if len(keep) == 0:
                    return dict(zip(rows, starmap(_drawn, wave.results()), strict=True)), peak
                select_rows(cache, keep)
                token = token[keep]
            logits = _forward(
                self.model, token[:, None], wave.mask(), wave.positions(), cache=cache
            )


def _drawn(tokens: list[int], logp: list[float], stopped: bool) -> Drawn:
    return Drawn(tokens=tokens, logp=logp, stopped=stopped)


def _forward(
    model: nn.Module,
    tokens: Int[Tensor, "N Q"],
    mask: Tensor,
    positions: Int[Tensor, "N Q"],
    *,
    cache: DynamicCache,
) -> Float[Tensor, "N V"]:
    """Logits after the last of ``tokens``, whose keys and values are added to ``cache``."""
    output = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
