"""The processes of one box, from the host's side: how they are ended, and how they ended.

It knows their numbers and nothing of what they say. A process that may have started others is not
waited for before its group is killed: till then its number, which is the group's, is nobody else's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Final, final

GRACE: Final = 1.0
"""Seconds for a process whose pipes are closed to be gone."""


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
        self._status: int | None = None
        self._lock = threading.Lock()  # of one who waits for the process after killing its group

    @property
    def pid(self) -> int:
        """Process id, on the host, of the outermost process."""
        return self._process.pid

    def kill(self) -> None:
        """End them at once; from any thread. ``reap`` is still due."""
        if self._wait(0.0) is not None:
            return  # its number may be another process's by now
        self._kill_others()
        for pid in _children(self.pid) or [self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def reap(self, patience: float) -> int:
        """Wait ``patience`` seconds for the process, then kill it; its exit status."""
        if self._status is None:
            self._status = self._wait(patience)
            if self._status is None:  # inner processes first: their parent then waits for them
                self._kill_others()
                for pid in (*_children(self.pid), self.pid):
                    if self._status is not None:
                        break  # the number may be another process's by now
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    self._status = self._wait(GRACE)
        return self._process.wait() if self._status is None else self._status

    def _kill_others(self) -> None:
        """The last one first: who started it waits for it and ends by itself.

        So no zombie is left to an init that reaps nothing.
        """
        if not self._starts_others:
            return
        until = time.monotonic() + GRACE
        while (found := _descendants(self.pid)) and time.monotonic() < until:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[-1], signal.SIGKILL)
            time.sleep(0.005)
        self._kill_group()

    def _kill_group(self) -> None:
        """The process is there still, if only as a zombie."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _wait(self, seconds: float) -> int | None:
        """The exit status, if the process ends within that time.

        It may have been killed by itself (where memory is short, the kernel picks one); those that
        it started are then the children of another, and their group is what is known of them.
        """
        until = time.monotonic() + seconds
        while self._starts_others:
            with self._lock:
                if self._process.returncode is not None:
                    break
                if _has_ended(self.pid):
                    self._kill_group()
                    return self._process.wait()
            if time.monotonic() >= until:
                return None
            time.sleep(0.005)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


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
