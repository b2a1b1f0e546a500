"""What multiplies matrices in training on a CPU, and how to have it multiply.

torch gives float32 products to its BLAS and bfloat16 ones to oneDNN. On some processors (those with
AVX-512 that are not Intel's, above all) oneDNN is twice as fast in float32 too, or the own kernels
(``native/product.cpp``) are faster than either; on others, those with matrix units above all, they
are not. Which are the fastest is measured in ``timed_products.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from gruppo import native

Products = Literal["torch", "onednn", "native"]

_CURRENT: ContextVar[Products] = ContextVar("products", default="torch")
_PRODUCTS = {torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul, torch.mm}


@cache
def can_choose(products: str, compute: torch.dtype) -> bool:
    """Whether these products, of those that are not torch's, can be had here in ``compute``."""
    if products == "native":
        return native.can_multiply(compute)
    if products == "torch" or compute != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    try:
        _onednn(torch.ones(2, 3), torch.ones(2, 3))
    except (RuntimeError, AttributeError, NotImplementedError):  # an operator of another version
        return False
    return True


@cache
def has_blocks(compute: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN take matrices packed before, on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=compute), 1)
    except (RuntimeError, AttributeError, NotImplementedError):  # it may name what bfloat16 needs
        return False
    return True


@contextmanager
def multiplying(products: Products) -> Iterator[None]:
    """Within, products of matrices on the CPU are made by ``products``, where it can.

    oneDNN makes those in float32. The own kernels make those too, and in bfloat16 those of packed
    rows and of the head (``joint.py``); elsewhere bfloat16 products are torch's. Gradients are made
    by the same library wherever the backward pass runs. What is recomputed in a backward pass
    (gradient checkpointing) is not, so that and other products than torch's do not go together.
    Within, nobody else's choice gives modules' own products back to torch.
    """
    with choosing(products), taking_over():
        yield


@contextmanager
def choosing(products: Products) -> Iterator[None]:
    """The same for what asks: :func:`multiply`, ``Joint`` and what is within ``taking_over``."""
    chosen: Products = products if can_choose(products, torch.float32) else "torch"
    token = _CURRENT.set(chosen)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def taking_over() -> AbstractContextManager[object]:
    """Within, modules' own float32 products are made by what multiplies now.

    It stands between Python and every call of torch, so only where modules multiply.
    """
    products = _CURRENT.get()
    if products == "torch" or torch.is_autocast_enabled("cpu"):
        return nullcontext()
    return _Instead(products)


def multiply(
    left: Float[Tensor, "N I"],
    right: Float[Tensor, "O I"],
    bias: Float[Tensor, "O"] | None = None,
) -> Float[Tensor, "N O"]:
    """``left`` times ``right`` transposed, plus ``bias``, by what multiplies now."""
    products = _CURRENT.get() if _is_ours(left, right, bias) else "torch"
    return MULTIPLY[products](left, right, bias)


def current_products() -> Products:
    """What multiplies now, for a backward pass of one's own to go on with."""
    return _CURRENT.get()


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory is as it looks: a wrapper's (quantised, sharded) need not be."""
    return type(tensor) in (Tensor, nn.Parameter)


class _Instead(TorchFunctionMode):
    """Takes linear layers and products of two float32 matrices from torch; all else stays."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self._products: Products = products

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if not kwargs:
            if func is nn.functional.linear and _is_ours(*args):
                return _linear(self._products, *args)
            if func in _PRODUCTS and args[0].dim() == args[1].dim() == 2 and _is_ours(*args):
                return _linear(self._products, args[0], args[1].t())
        return func(*args, **(kwargs or {}))


def _is_ours(left: Tensor, right: Tensor, bias: Tensor | None = None) -> bool:
    return (
        is_plain(left)
        and is_plain(right)
        and (bias is None or (is_plain(bias) and bias.shape == right.shape[:1]))
        and left.dtype == right.dtype == torch.float32
        and left.dim() > 1
        and left.device.type == right.device.type == "cpu"
        and right.dim() == 2
        and left.numel() > 0
        and right.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _linear(products: Products, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows`` [*, I] times ``weight`` [O, I] transposed, plus ``bias`` [O]."""
    flat = rows.reshape(-1, rows.shape[-1])
    return _Linear.apply(products, flat, weight, bias).unflatten(0, rows.shape[:-1])


class _Linear(torch.autograd.Function):
    """A linear layer whose three products are another library's than torch's."""

    @staticmethod
    def forward(
        ctx: Any, products: Products, rows: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.multiply = MULTIPLY[products]
        return ctx.multiply(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        rows, weight = ctx.saved_tensors
        _, of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            None,
            ctx.multiply(grad, weight.t()) if of_rows else None,
            ctx.multiply(grad.t(), rows.t()) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left`` [N, I] times ``right`` [O, I] transposed."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


def _native(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by the own kernels."""
    if right.stride(0) == 1 != right.stride(1):
        panels = native.cut_rows([right.t()], left.dtype)
    else:
        panels = native.cut_columns([right.contiguous()], left.dtype)
    return native.multiply(left, panels, bias=bias)


def _torch(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(left, right, bias)


# Unchecked: whoever takes one sees to types and devices, as ``multiply`` does.
MULTIPLY: dict[Products, Callable[..., Tensor]] = {
    "torch": _torch,
    "onednn": _onednn,
    "native": _native,
}
