"""Drawing one token a row in one visit of its logits; defined by the engine's plain sampler."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.native.compiled import kernel, kernels
from gruppo.types import Sampling

_NAMES = {torch.float32: "sample_float32", torch.bfloat16: "sample_bfloat16"}


def can_sample(logits: Tensor) -> bool:
    """Whether ``sample`` can take such logits here."""
    return logits.device.type == "cpu" and logits.dtype in _NAMES and kernels() is not None


def sample(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, "N"], sampling: Sampling
) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]] | None:
    """Token ids [N] and natural-log probabilities [N] in float32, or None for broken logits.

    What is drawn by ``uniform`` (float64) is what ``gruppo.engine.sampler.sample`` says. Logits
    are broken if a row holds NaN or +inf, or -inf alone. Only for what ``can_sample``.
    """
    logits, uniform = logits.contiguous(), uniform.to(torch.float64).contiguous()
    rows, width = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    broken = kernel(_NAMES[logits.dtype], "iifidfpppp", ctypes.c_int64)(
        *(rows, width, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p),
        *(tensor.data_ptr() for tensor in (logits, uniform, token, logp)),
    )
    return None if broken else (token, logp)
