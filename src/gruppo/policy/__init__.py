"""The trainable policy: weights, optimizer, schedule and reference."""

from gruppo.policy.optim import Optim, lr_at
from gruppo.policy.policy import Policy, UpdateReport

__all__ = ["Optim", "Policy", "UpdateReport", "lr_at"]
