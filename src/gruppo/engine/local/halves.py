"""16-bit copies of linear layers' matrices at addresses that stay, instead of autocast's cache.

Autocast casts a weight when it is first used and keeps the copy; inside a captured graph that
copy would be cast anew at every replay, and belong to the graph. So on CUDA the cache is off, and
the matrices are cast once per call, to where they were before. The products are autocast's, bit
for bit. They take 2 bytes a weight as long as they are kept. It knows no other parameters: those
are small, or their products are cast at every token (experts that are no ``nn.Linear``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn


@final
class Halves:
    """The copies, and for which weights they were made."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.Size], Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of the copies."""
        return sum(copy.numel() * copy.element_size() for copy in self._copies.values())

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the copies lie."""
        return tuple(copy.data_ptr() for copy in self._copies.values())

    @contextmanager
    def standing_in(self, model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
        """Within, under autocast, float32 linear layers multiply by copies of today's weights.

        Args:
            model: layers of another type than ``nn.Linear`` stay as they are.
            dtype: that of autocast; None does nothing.
        """
        layers = [
            module
            for module in model.modules()
            # one that a hook or a user's own forward sits on stays as it is
            if dtype is not None
            and type(module) is nn.Linear
            and module.weight.dtype == torch.float32
            and "forward" not in vars(module)
        ]
        try:
            self._refresh(layers, dtype)
            for layer in layers:
                vars(layer)["forward"] = _product(layer, self._copies[_name(layer.weight)])
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)

    def drop(self) -> None:
        """Free the copies."""
        self._copies.clear()

    def _refresh(self, layers: list[nn.Linear], dtype: torch.dtype | None) -> None:
        weights = {_name(layer.weight): layer.weight.detach() for layer in layers}
        for name in [name for name in self._copies if name not in weights]:
            del self._copies[name]
        for name, weight in weights.items():
            if name not in self._copies:
                self._copies[name] = torch.empty_like(weight, dtype=dtype)
            self._copies[name].copy_(weight)


def _name(weight: Tensor) -> tuple[int, torch.Size]:
    """What tells weights apart; tied ones are one."""
    return weight.data_ptr(), weight.shape


def _product(layer: nn.Linear, copy: Tensor) -> Callable[[Tensor], Tensor]:
    plain, bias, kind = layer.forward, layer.bias, copy.device.type

    def forward(rows: Tensor) -> Tensor:
        # where a model turns autocast off (a router in float32, say), its own product is meant
        if not torch.is_autocast_enabled(kind):
            return plain(rows)
        return nn.functional.linear(rows, copy, bias)

    return forward
