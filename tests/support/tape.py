"""A ``Capture`` for the CPU that keeps the promise of a CUDA graph: only device work is replayed.

The operations that reach the device are written down with the very tensors they used, and a replay
does them again in that order, without the Python that led to them. Tensors made on the way are
made anew; all others must lie where they lay. An operation that would wait for the device is an
error, as it is on CUDA.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class Writer(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"called a synchronizing operation: {name}")
        made = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, made))
        return made


class Tape:
    """``records`` counts captures, ``plays`` replays; ``used`` are the addresses they read."""

    def __init__(self, budget: int = 1 << 40) -> None:
        self.budget = budget
        self.num_bytes = 0
        self.records = self.plays = self.forgotten = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        writer = Writer()
        with writer:
            work()
        self.records += 1
        operations = writer.operations
        made = {id(t) for *_, out in operations for t in tensors(out)}
        used = [t for _, args, kwargs, _ in operations for t in tensors((args, kwargs))]
        addresses = {id(t): t.data_ptr() for t in used if id(t) not in made}
        held = {id(t): t for t in used}

        def replay() -> None:
            self.plays += 1
            assert all(held[key].data_ptr() == at for key, at in addresses.items())
            again(operations)

        return replay

    def forget(self) -> None:
        self.forgotten += 1


def again(operations: list[tuple[Any, tuple, dict, Any]]) -> None:
    now: dict[int, Tensor] = {}

    def present(tensor: Tensor) -> Tensor:
        return now.get(id(tensor), tensor)

    for func, args, kwargs, made in operations:
        remade = func(*replaced(args, present), **replaced(kwargs, present))
        now.update({id(a): b for a, b in zip(tensors(made), tensors(remade), strict=True)})


def replaced(tree: Any, present: Callable[[Tensor], Tensor]) -> Any:
    """What operators take are tensors, lists of them, and others; torch's tree maps are slow."""
    if isinstance(tree, Tensor):
        return present(tree)
    if isinstance(tree, dict):
        return {name: replaced(part, present) for name, part in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([replaced(part, present) for part in tree])
    return tree


def tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    replaced(tree, keep)
    return found
