"""The processes of one box, from the host's side: how they are ended, and how they ended.

It knows their numbers and nothing of what they say. A process that may have started others is not
waited for before its group is killed: till then its number, which is the group's, is nobody else's.
Several threads may end them, so one lock is held where the process is waited for and where signals
are sent: its own number is never free then, and an inner one's was its child's a moment before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, final

GRACE: Final = 1.0
"""Seconds for a process whose pipes are closed to be gone."""
# Seconds between looks at a process: soon at first, as most end at once.
_FIRST_PAUSE, _PAUSE = 0.0005, 0.005


@final
class Family:
    """A box's outermost process and its descendants.

    Args:
        process: the outermost one, in a session of its own.
        starts_others: whether it may start processes that no pid namespace ends with its first one
            (a compiler's).
    """

    def __init__(self, process: subprocess.Popen[bytes], *, starts_others: bool) -> None:
        self._process = process
        self._starts_others = starts_others
        self._lock = threading.Lock()  # held for a moment: nobody sleeps with it

    @property
    def pid(self) -> int:
        """Process id, on the host, of the outermost process."""
        return self._process.pid

    def kill(self) -> None:
        """End them at once; from any thread. ``reap`` is still due."""
        if self._ended() is None:
            self._kill_others()
            self._signal(lambda: _children(self.pid) or [self.pid])

    def reap(self, patience: float) -> int:
        """Wait ``patience`` seconds for the process, then kill it; its exit status."""
        status = self._wait(patience)
        if status is None:
            self._kill_others()
            # inner processes first: their parent then waits for them
            for pid in (*_children(self.pid), self.pid):
                self._signal(
                    lambda pid=pid: [pid] if pid in (*_children(self.pid), self.pid) else []
                )
                status = self._wait(GRACE)
                if status is not None:
                    break
        while status is None:
            status = self._wait(GRACE)
        return status

    def _kill_others(self) -> None:
        """The last one first: who started it waits for it and ends by itself.

        So no zombie is left to an init that reaps nothing.
        """
        if not self._starts_others:
            return
        until = time.monotonic() + GRACE
        while self._signal(lambda: _descendants(self.pid)[-1:]) and time.monotonic() < until:
            time.sleep(0.005)
        with self._lock:
            if self._process.returncode is None:
                self._kill_group()

    def _signal(self, find: Callable[[], Iterable[int]]) -> bool:
        """Kill those found while the process is there, if only as a zombie; whether any was."""
        with self._lock:
            found = [] if self._process.returncode is not None else list(find())
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return bool(found)

    def _kill_group(self) -> None:
        """With the lock held, and the process there, if only as a zombie."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _wait(self, seconds: float) -> int | None:
        """The exit status, if the process ends within that time."""
        until, pause = time.monotonic() + seconds, _FIRST_PAUSE
        while (status := self._ended()) is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(pause, left))
            pause = min(2 * pause, _PAUSE)
        return status

    def _ended(self) -> int | None:
        """The exit status, if the process has ended; it is waited for.

        It may have been killed by itself (where memory is short, the kernel picks one); those that
        it started are then the children of another, and their group is what is known of them.
        """
        with self._lock:
            if self._starts_others and self._process.returncode is None:
                if not _has_ended(self.pid):
                    return None
                self._kill_group()
            return self._process.poll()


def _has_ended(pid: int) -> bool:
    """Whether a child has; it stays a zombie."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _children(pid: int) -> list[int]:
    """Direct children of a process: the first process of its pid namespace, if it has one."""
    with contextlib.suppress(OSError, ValueError):
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _descendants(pid: int) -> list[int]:
    """Children, and theirs; each behind its parent."""
    return [found for child in _children(pid) for found in (child, *_descendants(child))]
