"""The machine under measurement: what it multiplies at best, its memory, and who else uses it."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

# A transformer's projections over a few thousand tokens: what training multiplies.
_SHAPES = ((2048, 576, 1536), (2048, 1536, 576), (4096, 2048, 2048))
_PATIENCE_S = 1.0
_GIB = 2**30
QUIET = 0.1
"""CPUs that other processes may use beside a timing: what a machine at rest does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """``gflops`` are the best of ``torch.nn.functional.linear``, by type of the products."""

    device: str
    name: str
    threads: int
    gflops: dict[str, float]
    torch: str = torch.__version__


def machine(device: str) -> Machine:
    """Measure it (a second or two)."""
    kinds = (torch.float32, torch.bfloat16)
    cuda = device.startswith("cuda")
    return Machine(
        device=device,
        name=torch.cuda.get_device_name(device) if cuda else _processor(),
        threads=torch.get_num_threads(),
        gflops={str(kind).removeprefix("torch."): _best(device, kind) for kind in kinds},
    )


def _best(device: str, dtype: torch.dtype) -> float:
    return max(_gflops(device, dtype, *shape) for shape in _SHAPES)


def _gflops(device: str, dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    seconds: list[float] = []
    # the first chooses and compiles kernels, and does not count; slow types are not tried for long
    while len(seconds) < 2 or (len(seconds) < 4 and sum(seconds) < _PATIENCE_S):
        started = time.perf_counter()
        torch.nn.functional.linear(left, right)
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / min(seconds[1:]) / 1e9


def wait(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_gib(device: str) -> float:
    """Highest memory of this process so far: of the device, or resident on the host."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / _GIB
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / _GIB
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


class Others:
    """CPUs that others than this process and its children used while something was measured."""

    share = 0.0


@contextmanager
def watching() -> Iterator[Others]:
    """Measure what others use meanwhile; above ``QUIET`` CPUs a timing is worth nothing."""
    seen = Others()
    started, busy, own = time.perf_counter(), _busy_seconds(), _own_seconds()
    yield seen
    wall = time.perf_counter() - started
    others = (_busy_seconds() - busy) - (_own_seconds() - own)
    seen.share = max(0.0, others) / wall


def _own_seconds() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _busy_seconds() -> float:
    """CPU seconds spent by all processes since the machine started; 0 where that is not told."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    first = stat.read_text(encoding="ascii").splitlines()[0].split()[1:]
    user, nice, system, _, _, interrupt, soft = (int(value) for value in first[:7])
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
