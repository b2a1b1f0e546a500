"""gruppo's attention function for Hugging Face models, registered as ``"gruppo"``.

It differs from transformers' ``sdpa`` where that is slow or refuses:

* one query token with a key-value cache: the query heads that share a key head become the queries
  of one attention call, so keys and values are never repeated (in bfloat16 on CPU 3-7 times
  faster, as the kernel has rows to work on);
* attention soft caps and sinks are computed (by plain matrix products) instead of refused.

All else goes to transformers' own function. Masks, sliding windows included, are transformers'
too. :func:`adopt` compares the result with the model's default before it is relied upon.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gruppo.model.packing import Packing, packed_attention
from gruppo.model.parts import causal, device_of, embedding

NAME = "gruppo"
PACKING = "gruppo_packing"
"""Keyword argument of a model's forward that carries a ``Packing``."""
# Largest difference of logits, relative to their largest value, that rounding can explain.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_PROBE_LENGTH = 9


def attention(
    module: nn.Module,
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "B Q H E"], None]:
    """Attention with ``H`` query heads over ``K`` key heads (grouped, arXiv:2305.13245).

    Called by transformers' attention modules. ``options`` may hold ``softcap``, ``s_aux`` (one
    sink logit per query head) and what ``sdpa`` takes. Attention dropout applies on the ``sdpa``
    path only (gruppo loads models with dropout 0).
    """
    if PACKING in options:
        return _packed(query, key, value, scaling=scaling, options=options), None
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        return _plain(query, key, value, attention_mask, scaling=scaling, options=options), None
    special = options.get("position_bias") is not None or options.get("cache") is not None
    if query.shape[2] == 1 and not special and _is_shared(attention_mask):
        grouped = _group_heads(query, key.shape[1])
        out = nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=attention_mask, scale=scaling
        )
        return out.reshape(len(query), 1, query.shape[1], -1), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **options
    )


def _packed(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, options: dict[str, Any]
) -> Tensor:
    """Attention over groups packed in one row; the layout comes with the forward's arguments."""
    special = options.get("softcap") is not None or options.get("s_aux") is not None

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if special:
            return _plain(q, k, v, mask, scaling=scaling, options=options)
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return mixed.transpose(1, 2)

    packing: Packing = options[PACKING]
    window = options.get("sliding_window")
    return packed_attention(query, key, value, packing.groups, kernel, window=window)


def _is_shared(mask: Tensor | None) -> bool:
    """Whether a mask is the same for all heads."""
    return mask is None or mask.shape[1] == 1


def _group_heads(query: Tensor, num_keys: int) -> Tensor:
    """[B, H, Q, D] to [B, K, (H/K) Q, D]: heads of one key head side by side."""
    return query.reshape(len(query), num_keys, -1, query.shape[-1])


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    options: dict[str, Any],
) -> Tensor:
    """Softmax attention by two products per key head, with soft cap and sinks; [B, Q, H, E].

    Soft cap: arXiv:2408.00118, section 2. Sinks: a learned logit per head that takes part in the
    softmax and is dropped (gpt-oss, arXiv:2508.10925).
    """
    rows, heads, length, width = query.shape
    grouped = _group_heads(query, key.shape[1])
    scores = grouped @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scores.view(rows, heads, length, -1).to(wide)
    if options.get("softcap") is not None:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    scores = _masked(scores, mask)
    if options.get("s_aux") is not None:
        sinks = options["s_aux"].to(wide).view(1, -1, 1, 1).expand(rows, heads, length, 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    mixed = weights.to(value.dtype).view(*grouped.shape[:3], -1) @ value
    return mixed.view(rows, heads, length, -1).transpose(1, 2).contiguous()


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Apply a boolean (True = seen) or additive mask; no mask means plainly causal."""
    if mask is None:
        length, seen = scores.shape[-2:]
        mask = torch.ones(length, seen, dtype=torch.bool, device=scores.device)
        mask = mask.tril(seen - length)
    if mask.dtype == torch.bool:
        # the smallest number, not -inf: a fully masked row of padding must stay finite
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def adopt(model: nn.Module) -> bool:
    """Switch ``model`` to this attention if its logits stay the same; else leave it as it was.

    Prefill and one decode step of a small batch are compared. Returns whether it was adopted.
    """
    known = causal(model)
    before = known.config._attn_implementation
    default = _probe(model)
    known.set_attn_implementation(NAME)
    if known.config._attn_implementation != NAME:
        return False
    ours = _probe(model)
    error = (ours - default).abs().max().item() / max(default.abs().max().item(), 1e-30)
    if error <= _TOLERANCE.get(known.dtype, 5e-2):
        return True
    known.set_attn_implementation(before)
    return False


@torch.no_grad()
def _probe(model: nn.Module) -> Tensor:
    """Logits of a prefill and of a decode step after it, for two left-padded rows."""
    device = device_of(model)
    ids = torch.arange(1, 2 * _PROBE_LENGTH + 1, device=device).view(2, -1)
    ids = ids % len(embedding(model))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    prefill = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    step = model(
        input_ids=ids[:, -1:],
        attention_mask=mask,
        past_key_values=prefill.past_key_values,
        use_cache=True,
    )
    # Padding positions hold whatever a kernel leaves there.
    return torch.cat([prefill.logits[:, 3:].flatten(0, 1), step.logits.flatten(0, 1)]).double()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
