"""Inside a WASI box: the driver's entry. The walls are outside of the interpreter (``runner``).

A guest has three descriptors and no others. Until a script begins, 0 and 1 are the host's commands
and our replies; ``fsync`` of one asks the runner to make it the program's own stream for good. In
the other jobs there is no input, and what is printed goes to the error output.
"""

from __future__ import annotations

import _json
import io
import os
import sys
from collections.abc import Callable
from typing import Any, Final

from gruppo.sandbox.inside import Channel, prepared, work


def main(commands: int, replies: int, pending: bytes) -> None:
    """Take the job and run it."""
    channel = Channel(commands, replies, pending, write=write, read=read, leave=os.fsync)
    work(channel, drop=_nothing, seal=_nothing, prepare=_prepare)


def _nothing(order: dict[str, Any]) -> None:
    """There is nothing here to give up."""


def _prepare(channel: Channel, job: dict[str, Any]) -> Callable[[], None]:
    if job["mode"] != "script":
        sys.stdin = sys.__stdin__ = io.StringIO()  # type: ignore[assignment,misc]
        sys.stdout = sys.__stdout__ = sys.stderr  # type: ignore[misc]
    return prepared(channel, job)


def _refuse(value: object) -> Any:
    raise TypeError(f"JSON has no {type(value).__name__}")


class _Decoder:
    """What the scanner of ``json`` asks of a decoder."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float


# The C part of ``json``, without the package around it: that imports re, enum and functools,
# which takes a fifth of a guest's start. The interpreter is a fixed one, and so is this part of it.
_scan: Final[Any] = _json.make_scanner(_Decoder)  # type: ignore[arg-type]
_encode: Final[Any] = _json.make_encoder(
    None, _refuse, _json.encode_basestring_ascii, None, ": ", ", ", False, False, True
)


def read(line: bytes) -> dict[str, Any]:
    """The object that a line of JSON from the host begins with."""
    return _scan(line.decode(), 0)[0]


def write(message: dict[str, Any]) -> str:
    """One line of JSON, as ``json.dumps`` makes it."""
    return "".join(_encode(message, 0))
