"""gruppo's attention function for Hugging Face models, registered as ``"gruppo"``.

It differs from transformers' ``sdpa`` where that is slow or refuses:

* one query token with a key-value cache: the query heads that share a key head become the queries
  of one attention call, so keys and values are never repeated (in bfloat16 on CPU 3-7 times
  faster, as the kernel has rows to work on);
* attention soft caps and sinks are computed (by plain matrix products) instead of refused;
* groups packed in one row (``packing.py``) and rows that share a prompt's keys (the engine's) bring
  their layout along as a keyword argument of the model's forward.

All else goes to transformers' own function. Masks, sliding windows included, are transformers'
too. :func:`adopt` compares the result with the model's default before it is relied upon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gruppo.model.flex import try_flex
from gruppo.model.packing import Packing, packed_attention
from gruppo.model.parts import causal, device_of, embedding
from gruppo.model.segments import can_merge, merged_attention

NAME = "gruppo"
PACKING = "gruppo_packing"
"""Keyword argument of a model's forward that carries a ``Packing``."""
SHARED = "gruppo_shared"
"""Keyword argument of a model's forward that carries an ``Attend``."""
# Largest difference of logits, relative to their largest value, that rounding can explain.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_PROBE_LENGTH = 9


@dataclass(frozen=True, slots=True, eq=False)
class AttentionRule:
    """How a layer makes attention weights of scores.

    ``scaling`` multiplies scores (None: the square root of the head's width, inverted). A token
    sees itself and the ``window - 1`` tokens before it (None: all). Soft cap: arXiv:2408.00118,
    section 2. ``sinks`` [H]: a learned logit per head that takes part in the softmax and is dropped
    (gpt-oss, arXiv:2508.10925).
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @staticmethod
    def of(scaling: float | None, options: dict[str, Any]) -> AttentionRule:
        """The rule in transformers' keyword arguments."""
        return AttentionRule(
            scaling, options.get("sliding_window"), options.get("softcap"), options.get("s_aux")
        )

    @property
    def is_plain(self) -> bool:
        """Whether nothing but a scaled softmax is asked for (the window is the mask's business)."""
        return self.softcap is None and self.sinks is None

    def seen(self, query: Int[Tensor, "*q"], key: Int[Tensor, "*k"]) -> Bool[Tensor, "*s"]:
        """Whether the token at position ``query`` sees that at ``key`` (broadcast)."""
        apart = query - key
        return apart >= 0 if self.window is None else (apart >= 0) & (apart < self.window)

    def attend(
        self,
        query: Float[Tensor, "B H Q D"],
        key: Float[Tensor, "B K S D"],
        value: Float[Tensor, "B K S E"],
        mask: Tensor | None,
    ) -> Float[Tensor, "B Q H E"]:
        """Attention of ``H`` query heads over ``K`` key heads; no mask means plainly causal."""
        if self.is_plain and mask is not None:
            mixed = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self.scaling, enable_gqa=True
            )
            return mixed.transpose(1, 2)
        grouped = _group_heads(query, key.shape[1])
        scores = (grouped @ key.mT).view(*query.shape[:3], -1)
        weights = self.weights(scores, mask, width=query.shape[-1]).to(value.dtype)
        mixed = weights.view(*grouped.shape[:3], -1) @ value
        return mixed.view(*query.shape[:3], -1).transpose(1, 2).contiguous()

    def weights(
        self, scores: Float[Tensor, "B H Q S"], mask: Tensor | None, *, width: int
    ) -> Float[Tensor, "B H Q S"]:
        """Softmax of products of queries and keys of ``width`` numbers, in wide floats."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores * (width**-0.5 if self.scaling is None else self.scaling)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = _masked(scores, mask)
        if self.sinks is None:
            return torch.softmax(scores, -1)
        sinks = self.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]


class Attend(Protocol):
    """What an engine passes along as ``SHARED``: attention over keys that it keeps itself."""

    def attend(self, layer_index: int, query: Tensor, rule: AttentionRule) -> Tensor:
        """Attention [B, Q, H, E] of ``query`` [B, H, Q, D] in one layer."""
        ...


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
    rule = AttentionRule.of(scaling, options)
    if SHARED in options:
        return options[SHARED].attend(module.layer_idx, query, rule), None
    if PACKING in options:
        packing: Packing = options[PACKING]
        return _packed(query, key, value, packing, rule), None
    if not rule.is_plain:
        return rule.attend(query, key, value, attention_mask), None
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
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, rule: AttentionRule
) -> Tensor:
    """Attention over a packed row: in few kernels where they are known to be right."""
    if rule.is_plain and rule.window is None and can_merge(query, key, value):
        return merged_attention(query, key, value, packing.parts, scaling=rule.scaling)
    if rule.sinks is None:
        mixed = try_flex(
            query,
            key,
            value,
            packing,
            rule.attend,
            window=rule.window,
            softcap=rule.softcap,
            scaling=rule.scaling,
        )
        if mixed is not None:
            return mixed
    return packed_attention(query, key, value, packing.groups, rule.attend, window=rule.window)


def _is_shared(mask: Tensor | None) -> bool:
    """Whether a mask is the same for all heads."""
    return mask is None or mask.shape[1] == 1


def _group_heads(query: Tensor, num_keys: int) -> Tensor:
    """[B, H, Q, D] to [B, K, (H/K) Q, D]: heads of one key head side by side."""
    return query.reshape(len(query), num_keys, -1, query.shape[-1])


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
