"""Weights of linear layers in the layout in which a CPU multiplies small batches fastest.

A decode step multiplies a few dozen rows by every weight matrix. oneDNN does that faster if the
matrix was cut into blocks before, once for all steps of a call. The copies live for that call
only, so they are never older than the weights. CPU only; other devices need no such thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gruppo.memory import is_out_of_memory

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
    layers = [
        module
        for module in model.modules()
        # one that a hook or a user's own forward sits on stays as it is
        if type(module) is nn.Linear and "forward" not in vars(module)
    ]
    if not (layers and all(_is_supported(weight, dtype) for weight in _kinds(layers))):
        yield
        return
    try:
        packed = _pack(layers, dtype, rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        packed = {}
    try:
        for layer in layers if packed else ():
            product = _product(layer, packed[layer.weight.data_ptr()], dtype)
            vars(layer)["forward"] = product
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _pack(layers: Sequence[nn.Linear], dtype: torch.dtype | None, rows: int) -> dict[int, Tensor]:
    """Packed copies by the address of the matrix, which several layers may share."""
    packed: dict[int, Tensor] = {}
    for layer in layers:
        weight = layer.weight
        if weight.data_ptr() not in packed:
            whole = weight.detach().to(dtype or weight.dtype)
            packed[weight.data_ptr()] = torch.ops.mkldnn._reorder_linear_weight(whole, rows)
    return packed


def _kinds(layers: Sequence[nn.Linear]) -> list[Tensor]:
    """One matrix of each device and type."""
    return list({(str(m.weight.device), m.weight.dtype): m.weight for m in layers}.values())


def _is_supported(weight: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether this build of torch packs such matrices on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        small = torch.zeros(16, 16, dtype=dtype or weight.dtype)
        torch.ops.mkldnn._reorder_linear_weight(small, 1)
    except RuntimeError:  # it names the instructions that bfloat16 would need, or the type
        return False
    return True


def _product(
    layer: nn.Linear, weight: Tensor, dtype: torch.dtype | None
) -> Callable[[Tensor], Tensor]:
    multiply, plain, bias = torch.ops.mkldnn._linear_pointwise, layer.forward, layer.bias
    addend = None if bias is None else bias.detach().to(dtype or bias.dtype)

    def forward(rows: Tensor) -> Tensor:
        # where a model turns autocast off (a router in float32, say), its own product is meant
        if dtype is not None and not torch.is_autocast_enabled("cpu"):
            return plain(rows)
        taken = rows if dtype is None else rows.to(dtype)
        return multiply(taken, weight, addend, "none", [], "")

    return forward
