"""How much memory is there for a run: the device's, or what the host and its container leave."""

from __future__ import annotations

from pathlib import Path

import torch

from gruppo.recipe import Recipe
from gruppo.recipe.build import pin

_CONTAINER = Path("/sys/fs/cgroup")


def available_bytes(recipe: Recipe) -> int | None:
    """Bytes that this process may still come to hold, what it has included; None if not told."""
    device = pin(recipe.model).device
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    if device != "cpu":
        return None
    free = _field(Path("/proc/meminfo"), "MemAvailable:")
    own = _field(Path("/proc/self/status"), "VmRSS:")
    if free is None or own is None:
        return None
    most, used = _number(_CONTAINER / "memory.max"), _number(_CONTAINER / "memory.current")
    if most is not None and used is not None:
        # what the container read from files is counted as used, and given up when memory is short
        cached = _field(_CONTAINER / "memory.stat", "inactive_file ", unit=1) or 0
        free = min(free, max(most - max(used - cached, 0), 0))
    return free + own


def _field(path: Path, name: str, *, unit: int = 1024) -> int | None:
    if not path.exists():
        return None
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * unit
    return None


def _number(path: Path) -> int | None:
    """What the file holds; None for "max" or no file."""
    if not path.exists():
        return None
    text = path.read_text(encoding="ascii", errors="replace").strip()
    return int(text) if text.isdigit() else None
