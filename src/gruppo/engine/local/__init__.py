"""The engine that runs the policy's own module in this process."""

from gruppo.engine.local.engine import LocalEngine

__all__ = ["LocalEngine"]
