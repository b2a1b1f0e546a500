"""Running untrusted programs: boxes that return data, and never a verdict.

``choose`` tries what this machine offers and refuses what does not hold; ``boxes`` keeps a few.
What a right answer is, the sandbox does not know: see ``gruppo.reward.code``.
"""

from gruppo.sandbox.base import (
    Backend,
    Call,
    NoSandbox,
    Outcome,
    Returned,
    Sandbox,
    SandboxFailure,
)
from gruppo.sandbox.box import Box
from gruppo.sandbox.choose import Choice, boxes, choose
from gruppo.sandbox.pool import FreshBox, Pool
from gruppo.sandbox.wire import Unsendable, decode, encode, same

__all__ = [
    "Backend",
    "Box",
    "Call",
    "Choice",
    "FreshBox",
    "NoSandbox",
    "Outcome",
    "Pool",
    "Returned",
    "Sandbox",
    "SandboxFailure",
    "Unsendable",
    "boxes",
    "choose",
    "decode",
    "encode",
    "same",
]
