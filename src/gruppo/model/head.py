"""From hidden states to log-probabilities of given tokens, without keeping the logits.

The projection to the vocabulary is done for a chunk of positions at a time, forward and backward,
so that memory is O(chunk x vocabulary) whatever the number of positions. Which positions to score
is the business of ``logprob.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gruppo.model.parts import text_config
from gruppo.model.products import current_products, multiplying


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRule:
    """What happens to raw logits before the softmax: scale, soft cap, temperature, in this order.

    ``softcap`` c is Gemma 2's ``c * tanh(z / c)`` (arXiv:2408.00118, section 2).
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Ruled logits; never in place, as autograd may need the raw ones."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if self.temperature == 1.0 else logits / self.temperature

    def chain_(
        self, gradient: Float[Tensor, "N V"], logits: Float[Tensor, "N V"]
    ) -> Float[Tensor, "N V"]:
        """Turn the gradient of the ruled ``logits`` into that of the raw ones (both clobbered)."""
        if self.softcap is not None:
            slope = logits.mul_(self.temperature / self.softcap).square_().neg_().add_(1.0)
            gradient.mul_(slope)
        if self.scale != self.temperature:
            gradient.mul_(self.scale / self.temperature)
        return gradient


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
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Log-probabilities of ``tokens`` and entropies of their distributions, both differentiable.

    Under autocast the products are in its type; softmax and sums are float32 (float64 for float64
    hidden states). Entropies are zeros unless ``entropy``; where no gradient comes back to them,
    as when they only are logged, the backward pass computes none. A plain linear head takes a fused
    forward and backward; any other module (a head with an adapter, say) is called chunk by chunk
    and recomputed in the backward pass.
    """
    assert chunk > 0, f"chunk = {chunk}"
    if type(head) is nn.Linear:
        return _FusedHead.apply(hidden, head.weight, head.bias, tokens, (rule, entropy, chunk))
    parts = [
        checkpoint(_plain_chunk, head, part, picked, (rule, entropy), use_reentrant=False)
        for part, picked in zip(hidden.split(chunk), tokens.split(chunk), strict=True)
    ]
    logp, entropies = (torch.cat(terms) for terms in zip(*parts, strict=True))
    return logp, entropies


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _plain_chunk(
    head: nn.Module, hidden: Tensor, tokens: Tensor, options: tuple[LogitRule, bool]
) -> tuple[Tensor, Tensor]:
    rule, entropy = options
    logits = head(hidden).to(_wide(hidden.dtype))
    full = torch.log_softmax(rule.apply(logits), -1)
    logp = full.gather(-1, tokens[:, None])[:, 0]
    return logp, -(full.exp() * full).sum(-1) if entropy else torch.zeros_like(logp)


class _FusedHead(torch.autograd.Function):
    """Linear head, log-softmax and gather in one node; the backward recomputes chunk logits.

    With p the softmax, H its entropy: d logp / dz = onehot - p and dH / dz = -p (log p + H). An
    output that the loss does not use has no gradient (None, not zeros), and costs no work.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        options: tuple[LogitRule, bool, int],
    ) -> tuple[Tensor, Tensor]:
        rule, entropy, chunk = options
        kind = hidden.device.type
        ctx.product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.options, ctx.products = options, current_products()
        ctx.set_materialize_grads(False)
        wide = _wide(hidden.dtype)
        logp, lse, spread = (hidden.new_zeros(len(hidden), dtype=wide) for _ in range(3))
        with torch.autocast(kind, enabled=False):
            rows, matrix = _cast(hidden, ctx.product), _cast(weight, ctx.product)
            for part in _slices(len(hidden), chunk):
                z = _logits(rows[part], matrix, bias, rule, wide)
                lse[part] = z.logsumexp(-1)
                logp[part] = z.gather(-1, tokens[part, None])[:, 0] - lse[part]
                if entropy:
                    p = (z - lse[part, None]).exp_()
                    spread[part] = lse[part] - p.mul_(z).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, tokens, lse, spread)
        return logp, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        grad_logp, grad_entropy = grad_outputs
        hidden, weight, bias, tokens, lse, spread = ctx.saved_tensors
        (rule, entropy, chunk), needs = ctx.options, ctx.needs_input_grad
        grad_logp = torch.zeros_like(lse) if grad_logp is None else grad_logp
        grads = _Gradients.zeros(hidden, weight, bias, needs)
        with torch.autocast(hidden.device.type, enabled=False), multiplying(ctx.products):
            rows, matrix = _cast(hidden, ctx.product), _cast(weight, ctx.product)
            for part in _slices(len(hidden), chunk):
                z = _logits(rows[part], matrix, bias, rule, lse.dtype)
                dz = (z - lse[part, None]).exp_()
                factor = grad_logp[part, None]
                if entropy and grad_entropy is not None:
                    shifted = z - (lse - spread)[part, None]
                    dz.mul_(shifted.mul_(grad_entropy[part, None]).add_(factor)).neg_()
                else:
                    dz.mul_(-factor)
                dz.scatter_add_(1, tokens[part, None], factor)
                grads.add(part, rule.chain_(dz, z), rows[part], matrix)
        return grads.hidden, grads.cast_weight(weight), grads.bias, None, None


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Sums over chunks; None where no gradient is wanted. The matrix sums up in wide floats."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]
    ) -> _Gradients:
        wide = _wide(hidden.dtype)
        return cls(
            torch.zeros_like(hidden) if needs[0] else None,
            torch.zeros_like(weight, dtype=wide) if needs[1] else None,
            torch.zeros_like(bias) if bias is not None and needs[2] else None,
        )

    def add(self, part: slice, dz: Tensor, rows: Tensor, matrix: Tensor) -> None:
        if self.bias is not None:
            self.bias.add_(dz.sum(0))
        dz = dz.to(rows.dtype)
        if self.hidden is not None:
            self.hidden[part] = (dz @ matrix).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight.add_(dz.t() @ rows)

    def cast_weight(self, weight: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(weight.dtype)


def _slices(total: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)]


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _logits(
    rows: Tensor, matrix: Tensor, bias: Tensor | None, rule: LogitRule, wide: torch.dtype
) -> Tensor:
    """Ruled logits of some rows in wide floats, [n, V]; a fresh tensor."""
    z = (rows @ matrix.to(rows.dtype).t()).to(wide)
    return rule.apply(z if bias is None else z.add_(bias))
