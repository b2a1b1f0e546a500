"""From hidden states to log-probabilities of given tokens, without all logits at once.

The projection to the vocabulary is done for a chunk of positions at a time, forward and backward,
so that memory is bounded whatever the number of positions (``fused.py``). Which positions to score
is the business of ``logprob.py``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gruppo.model.casts import Casts
from gruppo.model.fused import FusedHead, HeadOptions, wide_type
from gruppo.model.parts import text_config
from gruppo.model.products import Products, choosing, current_products, taking_over
from gruppo.model.rule import LogitRule


def logit_rule(model: nn.Module, temperature: float) -> LogitRule:
    """The rule of a Hugging Face causal model, read from its configuration, at ``temperature``.

    Raises:
        ValueError: ``temperature`` is not positive.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature = {temperature} must be positive: log-probabilities at temperature 0 "
            "(greedy) are not defined"
        )
    config = text_config(model).to_dict()
    scale = config.get("logit_scale") or 1.0  # Cohere
    scale *= config.get("lm_head_multiplier") or 1.0  # Falcon-H1
    scale /= config.get("logits_scaling") or 1.0  # Granite
    softcap = config.get("final_logit_softcapping")  # Gemma 2
    return LogitRule(scale=scale, softcap=softcap, temperature=temperature)


def token_logp(
    head: nn.Module,
    hidden: Float[Tensor, "N D"],
    tokens: Int[Tensor, "N"],
    *,
    rule: LogitRule,
    entropy: bool,
    chunk: int,
    casts: Casts | None = None,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Log-probabilities of ``tokens`` and entropies of their distributions, both differentiable.

    Under autocast the products are in its type; softmax and sums are float32 (float64 for float64
    hidden states). Entropies are zeros unless ``entropy``; where no gradient comes back to them,
    as when they only are logged, the backward pass computes none. A plain linear head takes a fused
    forward and backward; any other module (a head with an adapter, say) is called chunk by chunk
    and recomputed in the backward pass. ``casts`` keeps a plain head's weight as products take it.
    """
    assert chunk > 0, f"chunk = {chunk}"
    if type(head) is nn.Linear:
        options = HeadOptions(rule, entropy, chunk, torch.is_grad_enabled(), casts)
        return FusedHead.apply(hidden, head.weight, head.bias, tokens, options)
    products = current_products()  # of the pass that recomputes it, too
    parts = [
        checkpoint(_plain_chunk, head, part, picked, (rule, entropy, products), use_reentrant=False)
        for part, picked in zip(hidden.split(chunk), tokens.split(chunk), strict=True)
    ]
    logp, entropies = (torch.cat(terms) for terms in zip(*parts, strict=True))
    return logp, entropies


def _plain_chunk(
    head: nn.Module, hidden: Tensor, tokens: Tensor, options: tuple[LogitRule, bool, Products]
) -> tuple[Tensor, Tensor]:
    rule, entropy, products = options
    with choosing(products), taking_over():
        logits = head(hidden).to(wide_type(hidden.dtype))
    full = torch.log_softmax(rule.apply(logits), -1)
    logp = full.gather(-1, tokens[:, None])[:, 0]
    return logp, -(full.exp() * full).sum(-1) if entropy else torch.zeros_like(logp)
