"""Copies of a worker process, one for each conversation: run side by side, ended one by one.

Used inside ``child.py``. What a handler has imported is there in every copy at once and is shared
memory; what a copy does to itself (module globals, random states, a crash) is its own. A copy that
does not answer in time is killed, the others go on. Needs ``os.fork``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, final

_MAX_LINE: Final = 64 * 1024 * 1024  # of a message: texts; more is a runaway


@dataclass(frozen=True, slots=True)
class _Copy:
    pid: int
    line: socket.socket


@final
class Forks:
    """The copies of this process, by number. ``run`` is what a copy does with its line."""

    def __init__(self, run: Callable[[Any, socket.socket], None]) -> None:
        """Start nothing yet."""
        self._run = run
        self._copies: dict[int, _Copy] = {}
        self._next = 0

    def start(self, given: object) -> int:
        """Start a copy on ``given``; its number."""
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._become(given, theirs)
        theirs.close()
        with contextlib.suppress(OSError):  # as the copy does: whoever is first
            os.setpgid(pid, pid)
        self._next += 1
        self._copies[self._next] = _Copy(pid, ours)
        return self._next

    def send(self, number: int, message: object) -> None:
        """Send ``message`` to a copy. Raises RuntimeError if it has ended."""
        copy = self._copies.get(number)
        if copy is None:
            raise RuntimeError("the process has ended")
        copy.line.settimeout(None)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # then receive tells
            copy.line.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, number: int, seconds: float) -> Any:
        """The next message of a copy. One that ends, or is not in time, is no more.

        Raises:
            RuntimeError: why there is no message.
        """
        copy = self._copies[number]
        try:
            return json.loads(_read_line(copy.line, time.monotonic() + seconds))
        except TimeoutError:
            self.end(number)
            raise RuntimeError(f"no answer within {seconds:g} s") from None
        except (OSError, ValueError) as error:
            code = self.end(number)
            raise RuntimeError(f"{error} (exit status {code})") from None

    def end(self, number: int) -> int | None:
        """End a copy and what it started in its group; its exit status, None if it was killed."""
        copy = self._copies.pop(number, None)
        if copy is None:
            return None
        copy.line.close()
        for kill in (os.killpg, os.kill):  # itself too, should it have left its group
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(copy.pid, signal.SIGKILL)
        _, status = os.waitpid(copy.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return None if code == -signal.SIGKILL else code

    def _become(self, given: object, line: socket.socket) -> None:
        """Be a copy: its own group, its own line and none of the others'; never returns."""
        status = 1
        try:
            os.setpgid(0, 0)
            _die_with_parent()
            for descriptor in map(int, sys.argv[4:6]):  # child.py's two pipes
                os.close(descriptor)
            for other in self._copies.values():
                other.line.close()
            self._run(given, line)
            status = 0
        finally:
            os._exit(status)


def _read_line(line: socket.socket, deadline: float) -> bytes:
    """A line of a conversation in which each side says one line in turn."""
    found = bytearray()
    while not found.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        line.settimeout(left)
        chunk = line.recv(1 << 20)
        if not chunk:
            raise ValueError("the process ended")
        found += chunk
        if len(found) > _MAX_LINE:
            raise ValueError("the message is too long")
    return bytes(found)


def _die_with_parent() -> None:
    """Have this copy end with the worker, on Linux: a group of its own escapes the worker's."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
