"""The clipped loss of a value function (PPO, VAPO), per token and without a reduction.

Multiply by the weights of an aggregation mode and sum. The value model itself is not here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    *,
    returns: Float[Tensor, "B T"],
    clip: float = 0.2,
) -> Float[Tensor, "B T"]:
    """½ max((V − R)², (V_old + clip(V − V_old, ±c) − R)²) per token.

    The maximum keeps a step from profiting by moving V further than c. Source: PPO's public
    implementation (arXiv 1707.06347 leaves it out; discussed in arXiv 2005.12729, §2).
    """
    if not clip > 0.0:
        raise ValueError(f"clip = {clip} must be positive, such as 0.2")
    limited = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (limited - returns).square())
