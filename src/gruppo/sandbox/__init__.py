"""Running untrusted programs: boxes that return data, and never a verdict.

``choose`` tries what this machine offers and refuses what does not hold; ``boxes`` keeps a few,
``workshop`` those in which compilers run.
What a right answer is, the sandbox does not know: see ``gruppo.reward.code``.
"""

from gruppo.sandbox.base import (
    Backend,
    Binary,
    Call,
    NoSandbox,
    Outcome,
    Returned,
    Sandbox,
    SandboxFailure,
)
from gruppo.sandbox.box import Box
from gruppo.sandbox.choose import Choice, boxes, choose
from gruppo.sandbox.compiled import compile_program, try_out, workshop
from gruppo.sandbox.pool import FreshBox, Pool
from gruppo.sandbox.toolchain import CPP, C, Toolchain
from gruppo.sandbox.wire import Unsendable, decode, encode, same

__all__ = [
    "CPP",
    "Backend",
    "Binary",
    "Box",
    "C",
    "Call",
    "Choice",
    "FreshBox",
    "NoSandbox",
    "Outcome",
    "Pool",
    "Returned",
    "Sandbox",
    "SandboxFailure",
    "Toolchain",
    "Unsendable",
    "boxes",
    "choose",
    "compile_program",
    "decode",
    "encode",
    "same",
    "try_out",
    "workshop",
]
