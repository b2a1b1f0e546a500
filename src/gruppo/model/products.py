"""Which library multiplies float32 matrices in training, and how to have it multiply.

torch gives float32 products on a CPU to its BLAS. On some processors (those with AVX-512 that are
not Intel's, above all) oneDNN, which torch carries too, is twice as fast; on others it is not. So
it is measured. Results differ by rounding, hence a run records its choice and keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from gruppo.measured import fastest, remembered

Products = Literal["torch", "onednn"]

# A transformer's projections in a micro-batch; 1.8 GFLOP a product.
_ROWS, _INNER, _COLUMNS = 1024, 576, 1536
_REPEATS = 5
_WORTHWHILE = 1.15
_CURRENT: ContextVar[Products] = ContextVar("products", default="torch")
_PRODUCTS = {torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul, torch.mm}


def faster_products(device: torch.device | str, compute: torch.dtype) -> Products:
    """The faster library for products in ``compute`` on ``device``: "torch" unless measured else.

    oneDNN must gain 15 % over the products of a forward and a backward pass, the best of several
    runs counting. Timed once per machine (about 0.2 s) and kept, and only where there is a choice:
    float32 on a CPU.

    >>> faster_products("cpu", torch.bfloat16)
    'torch'
    """
    if torch.device(device).type != "cpu" or compute != torch.float32 or not _is_there():
        return "torch"
    return _measured()


@contextmanager
def multiplying(products: Products) -> Iterator[None]:
    """Within, float32 products of matrices on the CPU are made by ``products``.

    Their gradients are made by the same library wherever the backward pass runs. What is recomputed
    in a backward pass (gradient checkpointing) is not, so the two do not go together.
    """
    chosen: Products = products if _is_there() else "torch"
    token = _CURRENT.set(chosen)
    try:
        with _OneDnn() if chosen == "onednn" else nullcontext():
            yield
    finally:
        _CURRENT.reset(token)


def current_products() -> Products:
    """The library in force, for a backward pass of one's own to go on with."""
    return _CURRENT.get()


class _OneDnn(TorchFunctionMode):
    """Takes over linear layers and products of two matrices; all else is torch's."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if not kwargs:
            if func is nn.functional.linear and _is_ours(args[0], args[1]):
                return _linear(*args)
            if func in _PRODUCTS and args[0].dim() == args[1].dim() == 2 and _is_ours(*args):
                return _linear(args[0], args[1].t())
        return func(*args, **(kwargs or {}))


def _is_ours(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.float32
        and left.dim() > 1
        and left.device.type == right.device.type == "cpu"
        and right.dim() == 2
        and left.numel() > 0
        and right.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows`` [*, I] times ``weight`` [O, I] transposed, plus ``bias`` [O]."""
    flat = rows.reshape(-1, rows.shape[-1])
    return _Linear.apply(flat, weight, bias).unflatten(0, rows.shape[:-1])


class _Linear(torch.autograd.Function):
    """A linear layer whose three products are oneDNN's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _multiply(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        (grad,) = grad_outputs
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            _multiply(grad, weight.t()) if of_rows else None,
            _multiply(grad.t(), rows.t()) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def _multiply(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left`` [N, I] times ``right`` [O, I] transposed."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


@cache
def _is_there() -> bool:
    """Whether this build of torch can multiply so at all."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        _multiply(torch.ones(2, 3), torch.ones(2, 3))
    except (RuntimeError, AttributeError, NotImplementedError):  # an operator of another version
        return False
    return True


@cache
def _measured() -> Products:
    found = remembered(
        "products",
        ("torch", "onednn"),
        _compared,
        depends_on=(torch.__version__, str(torch.get_num_threads())),
    )
    return "onednn" if found == "onednn" else "torch"


def _compared() -> Products:
    ones = torch.ones
    rows, weight, grad = ones(_ROWS, _INNER), ones(_COLUMNS, _INNER), ones(_ROWS, _COLUMNS)
    work = ((rows, weight), (grad, weight.t()), (grad.t(), rows.t()))
    plain, other = fastest(
        [lambda: [a @ b.t() for a, b in work], lambda: [_multiply(a, b) for a, b in work]],
        repeats=_REPEATS,
    )
    return "onednn" if other * _WORTHWHILE < plain else "torch"
