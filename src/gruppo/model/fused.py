"""A linear head, log-softmax and gather in one node of automatic differentiation.

Logits are made for a chunk of positions at a time. The first chunks' are kept for the backward
pass, as far as a fixed budget goes; those of the others are made once more there. Either way the
gradient is the same to the bit. Softmax and its gradient are one C++ pass each where there are
kernels, and plain torch elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gruppo.model.casts import Casts
from gruppo.model.gradient import sums_up
from gruppo.model.joint import Joint, add_product, give_products
from gruppo.model.products import choosing, current_products
from gruppo.model.rule import LogitRule
from gruppo.native import can_softmax, pick, pick_gradient_

KEPT_BYTES: Final = 256 * 2**20
"""Logits of one forward pass that are kept for its backward pass."""


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How the head is computed; ``keep``: whether a backward pass can follow.

    ``casts`` keeps the weight in the products' type for the next pass.
    """

    rule: LogitRule
    entropy: bool
    chunk: int
    keep: bool
    casts: Casts | None = None

    def joint(self, weight: Tensor, rows: Tensor) -> Joint:
        """The weight as products with ``rows`` take it."""
        return Joint([weight], rows.dtype, self.casts)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type of softmax and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_positions(total: int, chunk: int, row_bytes: int) -> int:
    """Of ``total`` positions, those whose logits are kept: whole chunks, the first ones."""
    if total * row_bytes <= KEPT_BYTES:
        return total
    return KEPT_BYTES // (chunk * row_bytes) * chunk


class FusedHead(torch.autograd.Function):
    """``(hidden, weight, bias, tokens, options)`` to log-probabilities and entropies.

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
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (zeros unless asked for)."""
        kind = hidden.device.type
        product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.set_materialize_grads(False)
        wide = wide_type(hidden.dtype)
        logp, lse, spread = (hidden.new_zeros(len(hidden), dtype=wide) for _ in range(3))
        needed = options.keep and any(ctx.needs_input_grad)
        kept: dict[int, Tensor] = {}
        with torch.autocast(kind, enabled=False):
            rows = _cast(hidden, product)
            head = _Head(rows, options.joint(weight, rows), bias, options.rule, wide)
            for part in _slices(len(hidden), options.chunk):
                z = head.logits(part)
                logp[part], lse[part], spread[part] = head.pick(z, tokens[part], options.entropy)
                row_bytes = len(weight) * z.element_size()
                if needed and part.stop <= kept_positions(len(hidden), options.chunk, row_bytes):
                    kept[part.start] = z
                del z  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, bias, tokens, lse, spread)
        ctx.product, ctx.options, ctx.kept = product, options, kept
        ctx.weight = weight  # itself: what is saved may come back as another tensor
        ctx.products = current_products()
        return logp, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        """Gradients of hidden states, weight and bias."""
        grad_logp, grad_entropy = grad_outputs
        hidden, _, bias, tokens, lse, spread = ctx.saved_tensors
        weight = ctx.weight
        options: HeadOptions = ctx.options
        grad_logp = torch.zeros_like(lse) if grad_logp is None else grad_logp.contiguous()
        used = None if grad_entropy is None or not options.entropy else grad_entropy.contiguous()
        grads = _Gradients.zeros(hidden, weight, bias, ctx.needs_input_grad)
        with torch.autocast(hidden.device.type, enabled=False), choosing(ctx.products):
            rows = _cast(hidden, ctx.product)
            head = _Head(rows, options.joint(weight, rows), bias, options.rule, lse.dtype)
            for part in _slices(len(hidden), options.chunk):
                # taken out: they become the gradient, so a second backward pass makes them anew
                z = ctx.kept.pop(part.start, None)
                z = head.logits(part) if z is None else z
                given = None if used is None else used[part]
                dz = head.gradient_(
                    z, tokens[part], (lse[part], spread[part]), (grad_logp[part], given)
                )
                grads.add(part, dz, rows[part], head.joint)
                del z, dz
        return grads.hidden, grads.of_weight(weight), grads.bias, None, None


@dataclass(frozen=True, slots=True)
class _Head:
    """The head's operands in the type of the products, and softmax by kernel or by torch."""

    rows: Tensor
    joint: Joint
    bias: Tensor | None
    rule: LogitRule
    wide: torch.dtype

    def logits(self, part: slice) -> Tensor:
        """Logits of some rows [n, V], as the softmax takes them; a fresh tensor.

        In wide floats, or as the product has made them where a kernel widens them itself.
        """
        z = self.joint.forward(self.rows[part])
        if self.bias is None and self._is_native(z):
            return z
        z = z.to(self.wide)
        z = z if self.bias is None else z.add_(self.bias)
        return z if self._is_native(z) else self.rule.apply(z)

    def pick(self, z: Tensor, tokens: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of ``tokens``, log-sum-exps, and entropies (0 unless asked for)."""
        if self._is_native(z):
            return pick(z, tokens, scale=self.rule.slope, entropy=entropy)
        lse = z.logsumexp(-1)
        logp = z.gather(-1, tokens[:, None])[:, 0] - lse
        if not entropy:
            return logp, lse, torch.zeros_like(lse)
        p = (z - lse[:, None]).exp_()
        return logp, lse, lse - p.mul_(z).sum(-1)

    def gradient_(
        self,
        z: Tensor,
        tokens: Tensor,
        known: tuple[Tensor, Tensor],
        given: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        """Gradient of the raw logits, made of ``z`` (which is clobbered).

        ``known`` are log-sum-exps and entropies, ``given`` the gradients of both outputs.
        """
        (lse, spread), (grad_logp, grad_entropy) = known, given
        if self._is_native(z):
            slope = self.rule.slope
            return pick_gradient_(
                z,
                tokens,
                scale=slope,
                lse=lse,
                entropy=spread,
                grad_logp=grad_logp,
                grad_entropy=grad_entropy,
            )
        factor = grad_logp[:, None]
        if grad_entropy is None:
            alone = self.rule.softcap is None  # else the chain rule asks for z
            dz = (z.sub_(lse[:, None]) if alone else z - lse[:, None]).exp_().mul_(-factor)
        else:
            dz = (z - lse[:, None]).exp_()
            shifted = z - (lse - spread)[:, None]
            dz.mul_(shifted.mul_(grad_entropy[:, None]).add_(factor)).neg_()
        dz.scatter_add_(1, tokens[:, None], factor)
        return self.rule.chain_(dz, z)

    def _is_native(self, z: Tensor) -> bool:
        return self.rule.softcap is None and can_softmax(z)


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Sums over chunks; None where no gradient is wanted. The matrix sums up in wide floats.

    ``direct`` is the weight if its gradient is added to its own at once.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    direct: Tensor | None

    @classmethod
    def zeros(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]
    ) -> _Gradients:
        wide = wide_type(hidden.dtype)
        direct = needs[1] and sums_up(weight)
        return cls(
            torch.zeros_like(hidden) if needs[0] else None,
            torch.zeros_like(weight, dtype=wide) if needs[1] and not direct else None,
            torch.zeros_like(bias) if bias is not None and needs[2] else None,
            weight if direct else None,
        )

    def add(self, part: slice, dz: Tensor, rows: Tensor, joint: Joint) -> None:
        if self.bias is not None:
            self.bias.add_(dz.sum(0))
        dz = dz.to(rows.dtype)
        if self.hidden is not None:
            self.hidden[part] = joint.backward(dz, wide=True)
        if self.direct is not None and self.direct.grad is None:
            give_products([self.direct], [True], grad=dz, rows=rows)
            return
        total = self.weight if self.direct is None else self.direct.grad
        if total is not None:
            add_product(total, dz, rows)

    def of_weight(self, weight: Tensor) -> Tensor | None:
        """What autograd is to add to the weight's gradient."""
        return None if self.weight is None else self.weight.to(weight.dtype)


def _slices(total: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)]


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)
