"""A reference policy that is a copy of the model: making one, and moving it after the policy."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gruppo.model import cast_frozen, is_autocast


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` as it is now, without gradients; of a 16-bit ``dtype`` where products are in it."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    if is_autocast(dtype):
        cast_frozen(frozen, dtype)
    return frozen


def blend(reference: nn.Module, policy: nn.Module, mixup: float) -> None:
    """Move ``reference`` to ``mixup * policy + (1 - mixup) * reference``."""
    for held, live in zip(reference.parameters(), policy.parameters(), strict=True):
        # a bfloat16 reference would lose small moves if they were summed in bfloat16
        wide = torch.promote_types(held.dtype, live.dtype)
        held.copy_(torch.lerp(held.to(wide), live.to(wide), mixup))
