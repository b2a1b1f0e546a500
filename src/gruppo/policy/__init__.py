"""The trainable policy: weights, optimizer, schedule and reference.

Names are imported when they are first used: settings such as a recipe's records must not wait for
transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gruppo.policy.optim import Optim, lr_at
    from gruppo.policy.policy import Policy, UpdateReport

_HOMES = {
    "Optim": "gruppo.policy.optim",
    "Policy": "gruppo.policy.policy",
    "UpdateReport": "gruppo.policy.policy",
    "lr_at": "gruppo.policy.optim",
}

__all__ = ["Optim", "Policy", "UpdateReport", "lr_at"]


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(_HOMES[name]))[name]
