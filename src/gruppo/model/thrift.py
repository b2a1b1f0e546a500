"""What autograd keeps of a forward pass, less what is cheap to make again.

Norms and gated activations are chains of products and nonlinearities of which autograd keeps every
link: of ``silu(gate) * up`` four tensors, where ``gate`` and ``up`` are enough. Inside
:func:`thrifty`, a tensor that such an operation has made of tensors which are kept anyway is not
kept but made again by the same operation: gradients stay the same to the bit. It reads what
autograd knows, whatever the model. Results of matrix products are never made again. What it keeps
lies scattered, so it also watches the holes between (``memory.HoleWatch``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

from gruppo.memory import HoleWatch

_SAME_ORDER: Final = frozenset({"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})
_HELD: Final = 2  # newest results: the links of one chain, and what q, k and v share
# Operations, and how each is done again with what its node keeps.
_MAKERS: Final[dict[str, Callable[[Any], Tensor]]] = {
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
    "SiluBackward0": lambda node: torch.nn.functional.silu(node._saved_self),
    "GeluBackward0": lambda node: torch.nn.functional.gelu(
        node._saved_self, approximate=node._saved_approximate
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class Remade:
    """A tensor that is not kept: the operation that makes it, and the shape that is looked at."""

    node: Node
    shape: torch.Size


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A tensor that is kept, and how often it had been changed in place by then."""

    tensor: Tensor
    version: int

    def tensor_unchanged(self) -> Tensor:
        """The tensor. Raises RuntimeError if it was changed since, as autograd itself does."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"in-place operation: shape {tuple(self.tensor.shape)}, version "
                f"{self.tensor._version}, expected {self.version}"
            )
        return self.tensor


def remade(tensor: Tensor) -> Remade | None:
    """How ``tensor`` can be made again of what its operation keeps; None if it must be kept."""
    if tensor._version:  # changed in place: its operation would make another
        return None
    node = tensor.grad_fn
    while node is not None and node.name() in _SAME_ORDER:
        node = node.next_functions[0][0]
    if node is None or node.name() not in _MAKERS or not tensor.is_contiguous():
        return None
    # of a product each factor is kept only if the other one wants a gradient
    if any(source is None for source, _ in node.next_functions):
        return None
    return Remade(node, tensor.shape)


@contextmanager
def thrifty() -> Iterator[None]:
    """Inside, a forward pass keeps less for its backward pass.

    It stands in for hooks that were set outside of it: of several, autograd asks the innermost.
    """
    held: list[tuple[int, Tensor]] = []
    holes = HoleWatch()

    def pack(tensor: Tensor) -> Kept | Remade:
        holes.look(tensor.numel() * tensor.element_size())
        found = remade(tensor)
        # detached: an operation's own result would hold the operation, and so itself, for ever
        return Kept(tensor.detach(), tensor._version) if found is None else found

    def unpack(kept: Kept | Remade) -> Tensor:
        if isinstance(kept, Kept):
            holes.look(kept.tensor.numel() * kept.tensor.element_size())
            return kept.tensor_unchanged()
        number = kept.node._sequence_nr()  # no node: this closure belongs to all of them
        for known, result in held:
            if known == number:
                return result.view(kept.shape)
        with torch.no_grad():
            made = _MAKERS[kept.node.name()](kept.node)
        held.append((number, made))
        del held[:-_HELD]
        return made.view(kept.shape)

    with saved_tensors_hooks(pack, unpack):
        yield
