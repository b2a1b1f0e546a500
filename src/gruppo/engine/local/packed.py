"""Weights of linear layers in the layout in which a CPU multiplies small batches fastest.

A decode step multiplies a few dozen rows by every weight matrix. oneDNN and the own kernels do that
faster if the matrix was cut into blocks before, once for all steps of a call; matrices that are
given the same rows become one. The copies live for that call only, so they are never older than
the weights. CPU only; other devices need no such thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from gruppo import native
from gruppo.memory import is_out_of_memory
from gruppo.model.decoder import Group
from gruppo.model.products import Products as Library
from gruppo.model.products import has_blocks, is_plain

WORTHWHILE = 32
"""Decode steps from which on the copies, which cost about as much as one step, pay."""

Product = Callable[[Tensor], Tensor]
Products = Callable[[Group], Product]
"""What multiplies rows by the matrices of some layers; the results lie side by side."""


def plain_product(group: Group) -> Product:
    """The layers' own products, one after the other."""
    forwards = [layer.forward for layer in group]
    if len(forwards) == 1:
        return forwards[0]
    return lambda rows: torch.cat([forward(rows) for forward in forwards], dim=-1)


@contextmanager
def packed_linears(
    model: nn.Module,
    dtype: torch.dtype | None,
    *,
    rows: int,
    together: Sequence[Group] = (),
    products: Library = "torch",
) -> Iterator[Products]:
    """Within, ``model``'s plain linear layers multiply by packed copies; without gradients.

    Args:
        model: on the CPU; layers of another type than ``nn.Linear`` stay as they are.
        dtype: type of the products (that of autocast); None for the weights' own.
        rows: batch size that the layout is chosen for.
        together: layers that the model calls one after the other with the same rows.
        products: "native" has the own kernels multiply, where they can; else it is oneDNN.

    Yields:
        The product of rows [N, I] (in the type of products) with a group of ``together``, or with
        one layer.
    """
    layers = [
        module
        for module in model.modules()
        # one that a hook or a user's own forward sits on stays as it is
        if type(module) is nn.Linear and "forward" not in vars(module)
    ]
    joined = {layer for group in together for layer in group}
    groups = [*together, *((layer,) for layer in layers if layer not in joined)]
    is_native = products == "native" and all(_is_native(group, dtype) for group in groups)
    if not (layers and (is_native or all(_is_supported(w, dtype) for w in _kinds(layers)))):
        yield plain_product
        return
    try:
        packed = _pack(groups, dtype, None if is_native else rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        packed = {}
    try:
        for group, product in packed.items():
            forward = _forward(group, product, dtype)
            shared = _Shared(forward, [layer.out_features for layer in group])
            for index, layer in enumerate(group):
                vars(layer)["forward"] = forward if len(group) == 1 else shared.part(index)
        yield lambda group: packed[group] if group in packed else plain_product(group)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


@final
class _Shared:
    """A product of several layers, for a model that calls them one after the other."""

    def __init__(self, product: Product, widths: Sequence[int]) -> None:
        self._product = product
        self._widths = list(widths)
        self._rows: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, index: int) -> Product:
        """The forward of the layer with that index."""

        def forward(rows: Tensor) -> Tensor:
            if self._rows is not rows:
                self._rows, self._parts = rows, self._product(rows).split(self._widths, dim=-1)
            own = self._parts[index]
            if index == len(self._widths) - 1:
                self._rows, self._parts = None, ()
            return own

        return forward


def _pack(
    groups: Sequence[Group], dtype: torch.dtype | None, rows: int | None
) -> dict[Group, Product]:
    """Products by packed copies; that of matrices which several layers share exists once.

    By oneDNN's, for that many rows, or the own kernels' (None).
    """
    packed: dict[tuple[int, ...], Product] = {}
    for group in groups:
        if (at := _address(group)) not in packed:
            cast = dtype or group[0].weight.dtype
            packed[at] = _own(group, cast) if rows is None else _onednn(group, cast, rows)
    return {group: packed[_address(group)] for group in groups}


def _own(group: Group, dtype: torch.dtype) -> Product:
    weights, bias = [layer.weight.detach().contiguous() for layer in group], _bias(group, dtype)
    wide = None if bias is None else bias.float()
    return native.PanelProduct(native.cut_columns(weights, dtype), wide)


def _onednn(group: Group, dtype: torch.dtype, rows: int) -> Product:
    cast, bias = [layer.weight.detach().to(dtype) for layer in group], _bias(group, dtype)
    whole = torch.cat(cast) if len(cast) > 1 else cast[0]
    blocks = torch.ops.mkldnn._reorder_linear_weight(whole, rows)
    return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, blocks, bias, "none", [], "")


def _address(group: Group) -> tuple[int, ...]:
    parameters = [(layer.weight, layer.bias) for layer in group]
    return tuple(0 if p is None else p.data_ptr() for both in parameters for p in both)


def _kinds(layers: Sequence[nn.Linear]) -> list[Tensor]:
    """One matrix of each device and type."""
    return list({(str(m.weight.device), m.weight.dtype): m.weight for m in layers}.values())


def _is_native(group: Group, dtype: torch.dtype | None) -> bool:
    """Whether the own kernels multiply by these matrices together."""
    kinds = {layer.weight.dtype for layer in group}
    return len(kinds) == 1 and all(
        layer.weight.device.type == "cpu"
        and layer.weight.dtype in (torch.float32, torch.bfloat16)
        and native.can_multiply(dtype or layer.weight.dtype)
        and is_plain(layer.weight)
        for layer in group
    )


def _is_supported(weight: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether oneDNN packs such matrices here."""
    return weight.device.type == "cpu" and has_blocks(dtype or weight.dtype)


def _forward(group: Group, product: Product, dtype: torch.dtype | None) -> Product:
    """A product for a model to call: rows of any shape and type, and autocast's rules."""
    plain = plain_product(group)

    def forward(rows: Tensor) -> Tensor:
        # where a model turns autocast off (a router in float32, say), its own product is meant
        if dtype is not None and not torch.is_autocast_enabled("cpu"):
            return plain(rows)
        taken = rows if dtype is None else rows.to(dtype)
        made = product(taken.reshape(-1, taken.shape[-1]))
        return made.view(*taken.shape[:-1], made.shape[-1])

    return forward


def _bias(group: Group, dtype: torch.dtype) -> Tensor | None:
    """The layers' biases side by side, 0 for a layer without one; None if none has one."""
    if all(layer.bias is None for layer in group):
        return None
    return torch.cat(
        [
            layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
            for layer in group
        ]
    ).to(dtype)
