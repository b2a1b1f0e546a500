"""In which number format a device should multiply, found out by timing it.

bfloat16 products are several times faster than float32 on processors that have instructions for
them and several times slower on those that have not, and no flag says which reliably. This module
measures. It casts nothing but the frozen matrices of :func:`cast_frozen`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from gruppo.measured import fastest, remembered

# A transformer's projections at a few hundred tokens; 0.3 GFLOP, so all timings take some 50 ms.
_ROWS, _INNER, _COLUMNS = 128, 1024, 1024
_REPEATS = 5
# Autocast also casts weights and activations: a smaller gain would be eaten by that.
_WORTHWHILE = 1.3


def compute_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The faster of bfloat16 and float32 for matrix products on ``device``.

    Timed once per machine and device (about 50 ms; 0.2 s where bfloat16 is emulated) and kept, so
    that two runs of one recipe compute alike. The best of several runs counts, so that a busy
    machine does not decide. float32 unless bfloat16 gains at least 30 %.

    >>> compute_dtype("cpu") in (torch.bfloat16, torch.float32)
    True
    """
    return _measured(str(torch.device(device)))


@cache
def _measured(device: str) -> torch.dtype:
    def compare() -> str:
        single, half = fastest(
            [_product(device, dtype) for dtype in (torch.float32, torch.bfloat16)],
            repeats=_REPEATS,
        )
        return "bfloat16" if half * _WORTHWHILE < single else "float32"

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    threads = str(torch.get_num_threads())
    found = remembered(
        "compute",
        ("float32", "bfloat16"),
        compare,
        depends_on=(name, torch.__version__, threads),
    )
    return torch.bfloat16 if found == "bfloat16" else torch.float32


def _product(device: str, dtype: torch.dtype) -> Callable[[], float]:
    """A linear layer in ``dtype``."""
    left = torch.ones(_ROWS, _INNER, device=device, dtype=dtype)
    right = torch.ones(_COLUMNS, _INNER, device=device, dtype=dtype)
    # Reading a value back waits for the device, whatever its kind.
    return lambda: nn.functional.linear(left, right)[0, 0].item()


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen weights of ``model``'s linear layers to ``dtype``, in place.

    Autocast keeps a cast copy of a weight only while it is trainable; a frozen one would be cast
    anew in every product. Casting it once gives the same products bit for bit, as long as all
    else (embeddings, norms, biases, and so the residual stream) stays as it is, though it may move:
    nothing is left in the file that the model was read from. A matrix shared with an embedding is
    left alone.
    """
    for weight in _matrices(model):
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)
    for tensor in (*model.parameters(), *model.buffers()):
        # what is still in a file that is mapped into memory keeps all of it there, old matrices too
        if tensor.device.type == "cpu" and not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()


def frozen_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What the weights of ``model`` would take, were all frozen and cast to ``dtype``."""
    cast = {id(weight) for weight in _matrices(model)} if is_autocast(dtype) else set()
    return sum(
        p.numel() * dtype.itemsize if id(p) in cast else p.nbytes for p in model.parameters()
    )


def _matrices(model: nn.Module) -> list[Tensor]:
    """Those of linear layers, but for one that is shared with an embedding."""
    modules = list(model.modules())
    embeddings = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    linears = {id(m.weight): m.weight for m in modules if isinstance(m, nn.Linear)}
    return [w for at, w in linears.items() if w.is_floating_point() and at not in embeddings]


def is_autocast(dtype: torch.dtype) -> bool:
    """True if computing in ``dtype`` means autocast over wider weights.

    Raises:
        ValueError: ``dtype`` is none of bfloat16, float32 and float64 (float16 would need loss
            scaling, which gruppo does not do).
    """
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"compute_dtype = {dtype} is not supported: use torch.bfloat16, torch.float32 or "
            "torch.float64"
        )
    return dtype == torch.bfloat16
