"""Inside a WASI box: the driver's entry. The walls are outside of the interpreter (``runner``).

A guest has three descriptors and no others. Until a script begins, 0 and 1 are the host's commands
and our replies; ``fsync`` of one asks the runner to make it the program's own stream for good. In
the other jobs there is no input, and what is printed goes to the error output.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any

from gruppo.sandbox.inside import Channel, prepared, work


def main(commands: int, replies: int, pending: bytes) -> None:
    """Take the job and run it."""
    channel = Channel(commands, replies, pending, leave=os.fsync)
    work(channel, drop=_nothing, seal=_nothing, prepare=_prepare)


def _nothing(order: dict[str, Any]) -> None:
    """There is nothing here to give up."""


def _prepare(channel: Channel, job: dict[str, Any]) -> Callable[[], None]:
    if job["mode"] != "script":
        sys.stdin = sys.__stdin__ = io.StringIO()  # type: ignore[assignment,misc]
        sys.stdout = sys.__stdout__ = sys.stderr  # type: ignore[misc]
    return prepared(channel, job)
