"""Linear layers that read the same rows, as one matrix: its products and their gradients.

By what multiplies now (``products.py``): torch takes a joint copy in the products' type, which is
kept from pass to pass (frozen matrices of that type are taken one by one instead: a copy would stay
for good); the own kernels take panels that are cut from the weights as they are and
live as long as the :class:`Joint`, and they sum up the weights' gradients in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo import native
from gruppo.model.casts import Casts, joined
from gruppo.model.gradient import add, give, sums_up
from gruppo.model.products import current_products, is_plain, multiply


@final
class Joint:
    """The ``weights`` [O_k, I] of some layers below each other: W [O, I], O the sum of all O_k.

    Args:
        weights: contiguous; parameters, or what autograd saved of them.
        dtype: of the products.
        casts: keeps the joint copy for the next pass, where there has to be one.
    """

    def __init__(
        self, weights: Sequence[Tensor], dtype: torch.dtype, casts: Casts | None = None
    ) -> None:
        self._weights = list(weights)
        self._dtype = dtype
        self._casts = casts
        self._panels: dict[str, native.Panels] = {}
        self._whole: Tensor | None = None
        self._is_native = len({weight.dtype for weight in weights}) == 1 and all(
            is_native(weight, dtype) and weight.is_contiguous() for weight in weights
        )

    def forward(
        self, rows: Float[Tensor, "N I"], bias: Float[Tensor, "O"] | None = None
    ) -> Float[Tensor, "N O"]:
        """``rows W^T + bias``; ``rows`` and the result are in the products' type."""
        if self._is_native:
            if "forward" not in self._panels:
                self._panels["forward"] = native.cut_columns(self._weights, self._dtype)
            return native.multiply(rows, self._panels["forward"], bias=bias)
        if are_apart(self._weights, self._dtype):
            sizes = [len(weight) for weight in self._weights]
            biases = [None] * len(sizes) if bias is None else bias.split(sizes)
            made = [multiply(rows, *both) for both in zip(self._weights, biases, strict=True)]
            return torch.cat(made, 1)
        return multiply(rows, self._matrix(), bias)

    def backward(self, grad: Float[Tensor, "N O"], *, wide: bool = False) -> Float[Tensor, "N I"]:
        """``grad W``: the gradient of the rows, in the products' type.

        ``wide`` spares the rounding where the library can: it comes in float32 then.
        """
        if self._is_native:
            if "backward" not in self._panels:
                self._panels["backward"] = native.cut_rows(self._weights, self._dtype)
            dtype = torch.float32 if wide else self._dtype
            return native.multiply(grad, self._panels["backward"], dtype=dtype)
        if are_apart(self._weights, self._dtype):
            parts = grad.split([len(weight) for weight in self._weights], 1)
            first, *others = (
                multiply(part.contiguous(), weight.detach().t())
                for part, weight in zip(parts, self._weights, strict=True)
            )
            for other in others:
                first += other
            return first
        return multiply(grad, self._matrix().t())

    def _matrix(self) -> Tensor:
        if self._whole is None:
            made = joined if self._casts is None else self._casts.of
            self._whole = made(self._weights, self._dtype)
        return self._whole


def are_apart(weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether torch multiplies by several matrices one by one, without a joint copy."""
    return len(weights) > 1 and not any(w.requires_grad or w.dtype != dtype for w in weights)


def is_native(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the own kernels multiply such matrices in ``dtype`` now."""
    return (
        current_products() == "native"
        and is_plain(tensor)
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and native.can_multiply(dtype)
    )


def give_products(
    weights: Sequence[Tensor],
    wanted: Sequence[bool],
    *,
    grad: Float[Tensor, "N O"],
    rows: Float[Tensor, "N I"],
) -> list[Tensor | None]:
    """What a node's ``backward`` returns for weights of one :class:`Joint`: ``grad^T rows``.

    Args:
        weights: the parameters themselves, to whose ``grad`` it may be added.
        wanted: whether each needs one; None is returned for the others.
        grad: that of all their results side by side.
        rows: what they took.
    """
    sizes = [len(weight) for weight in weights]
    if is_native(rows, rows.dtype):
        panels = native.cut_rows([rows.contiguous()], rows.dtype)
        return [
            _give_native(weight, part, panels) if is_wanted else None
            for weight, part, is_wanted in zip(weights, grad.split(sizes, 1), wanted, strict=True)
        ]
    parts = multiply(grad.t(), rows.t()).split(sizes)
    return [
        give(weight, part) if is_wanted else None
        for weight, part, is_wanted in zip(weights, parts, wanted, strict=True)
    ]


def _give_native(weight: Tensor, grad: Tensor, rows: native.Panels) -> Tensor | None:
    total = weight.grad if sums_up(weight) else None
    if total is None or not _is_sum(total):
        return give(weight, native.multiply(grad.t(), rows, dtype=torch.float32))
    native.multiply(grad.t(), rows, total=total)
    return None


def _is_sum(total: Tensor) -> bool:
    """Whether the own kernels can add to it."""
    return is_plain(total) and total.dtype == torch.float32 and total.is_contiguous()


def add_product(total: Tensor, grad: Float[Tensor, "N O"], rows: Float[Tensor, "N I"]) -> None:
    """``total += grad^T rows``, for a sum over parts of the rows."""
    if is_native(rows, rows.dtype) and _is_sum(total):
        native.multiply(grad.t(), native.cut_rows([rows.contiguous()], rows.dtype), total=total)
    elif total.dtype == rows.dtype and current_products() == "torch":
        total.addmm_(grad.t(), rows)
    else:
        add(total, multiply(grad.t(), rows.t()))
