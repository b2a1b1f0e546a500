"""Weights of linear layers in the layout in which a CPU multiplies small batches fastest.

A decode step multiplies a few dozen rows by every weight matrix. oneDNN does that faster if the
matrix was cut into blocks before, once for all steps of a call. The copies live for that call
only, so they are never older than the weights. CPU only; other devices need no such thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WORTHWHILE = 32
"""Decode steps from which on the copies, which cost about as much as one step, pay."""


@contextmanager
def packed_linears(model: nn.Module, dtype: torch.dtype | None, *, rows: int) -> Iterator[None]:
    """Within, ``model``'s plain linear layers multiply by packed copies; without gradients.

    Args:
        model: on the CPU; layers of another type than ``nn.Linear`` stay as they are.
        dtype: type of the products (that of autocast); None for the weights' own.
        rows: batch size that the layout is chosen for.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    if not (layers and _is_supported(layers[0], dtype)):
        yield
        return
    packed: dict[int, Tensor] = {}  # a matrix may be shared by several layers
    for layer in layers:
        weight = layer.weight
        if weight.data_ptr() not in packed:
            whole = weight.detach().to(dtype or weight.dtype)
            packed[weight.data_ptr()] = torch.ops.mkldnn._reorder_linear_weight(whole, rows)
    try:
        for layer in layers:
            vars(layer)["forward"] = _product(packed[layer.weight.data_ptr()], layer.bias, dtype)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _is_supported(layer: nn.Linear, dtype: torch.dtype | None) -> bool:
    """Whether this build of torch packs such matrices on this processor."""
    if layer.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        small = torch.zeros(16, 16, dtype=dtype or layer.weight.dtype)
        torch.ops.mkldnn._reorder_linear_weight(small, 1)
    except RuntimeError:  # it names the instructions that bfloat16 would need, or the type
        return False
    return True


def _product(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None
) -> Callable[[Tensor], Tensor]:
    multiply = torch.ops.mkldnn._linear_pointwise
    addend = None if bias is None else bias.detach().to(dtype or bias.dtype)

    def forward(rows: Tensor) -> Tensor:
        taken = rows if dtype is None else rows.to(dtype)
        return multiply(taken, weight, addend, "none", [], "")

    return forward
