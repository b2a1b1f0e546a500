"""The few collective operations that the algorithm needs, the same code for one process or many.

Losses are sums with global weights (``objective.weights``), so all that ranks must agree on is
a handful of counts. Without an initialised process group every function is the identity.
This module starts no processes and wraps no model.
"""

from __future__ import annotations

import torch
import torch.distributed as torch_dist
from torch import Tensor


def world_size() -> int:
    """Number of data-parallel ranks (1 without a process group)."""
    return torch_dist.get_world_size() if _active() else 1


def rank() -> int:
    """This process's rank (0 without a process group)."""
    return torch_dist.get_rank() if _active() else 0


def all_sum(counts: Tensor) -> Tensor:
    """Sum an integer or float tensor over all ranks. Returns a new tensor, same on every rank."""
    total = counts.clone()
    if _active():
        torch_dist.all_reduce(total, op=torch_dist.ReduceOp.SUM)
    return total


def all_max(value: float) -> float:
    """Largest of one number over all ranks."""
    held = torch.tensor(value, dtype=torch.float64)
    if _active():
        torch_dist.all_reduce(held, op=torch_dist.ReduceOp.MAX)
    return float(held)


def _active() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()
