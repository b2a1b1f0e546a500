"""Gradients of weights added where they are summed, without a copy in between.

Automatic differentiation wants each pass's gradient as a tensor in the weight's own type, which it
then adds to ``grad``: for products in bfloat16 that is three passes over memory in place of one.
Whoever calls ``backward`` only to sum up gradients may say so, and nodes written by hand then add
theirs at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from gruppo.native import add_, can_add

_SUMMING: ContextVar[bool] = ContextVar("summing", default=False)


@contextmanager
def summing() -> Iterator[None]:
    """Within, on this thread, ``backward`` is called to add to ``grad`` and for nothing else.

    Not for weights whose gradient another library waits for (data-parallel wrappers do).
    """
    token = _SUMMING.set(True)
    try:
        yield
    finally:
        _SUMMING.reset(token)


def sums_up(weight: Tensor) -> bool:
    """Whether :func:`give` adds to this weight's ``grad`` now."""
    if not (_SUMMING.get() and weight.is_leaf and weight.requires_grad):
        return False
    # a gradient lies as its weight does
    return weight.is_contiguous() and not (
        weight._backward_hooks or weight._post_accumulate_grad_hooks
    )


def give(weight: Tensor, grad: Tensor) -> Tensor | None:
    """What a node's ``backward`` returns for ``weight``: None once ``grad`` has been added.

    ``grad`` is the caller's own and may be kept.
    """
    if not sums_up(weight):
        return grad.to(weight.dtype)
    if weight.grad is None:
        weight.grad = grad.to(weight.dtype)
    else:
        add(weight.grad, grad)
    return None


def give_rows(weight: Tensor, rows: Tensor, grad: Tensor) -> Tensor | None:
    """The same for an embedding: ``grad`` [N, E] is that of its ``rows`` [N]."""
    direct = sums_up(weight)
    total = weight.grad if direct and weight.grad is not None else torch.zeros_like(weight)
    total.index_add_(0, rows, grad.to(weight.dtype))
    if not direct:
        return total
    weight.grad = total
    return None


def add(total: Tensor, part: Tensor) -> None:
    """``total += part``, whatever their types."""
    if can_add(total, part):
        add_(total, part)
    else:
        total.add_(part)
