"""One process at a time per run folder.

The kernel holds the lock and drops it when the process dies, however it dies, so nothing stale
can be left and no clock is read. What the file says (process, host) serves the error text only.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

# Descriptors of the locks held here. A forked child (a reward worker) would hold them on after
# our death, so it closes its copies at birth; the parent's lock is not touched by that.
_HELD: set[int] = set()


def acquire(file: Path) -> int:
    """Lock ``file`` (made if missing) and return the descriptor that holds the lock.

    Raises:
        ValueError: Another run holds it; the text names the folder and the process.
        OSError: The file cannot be opened, or its file system knows no locks.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise ValueError(
            f"run folder: {file.parent} is in use by {owner}; stop that run or choose another name"
        ) from None
    except OSError as error:
        os.close(handle)
        raise OSError(
            error.errno, f"cannot lock the run folder: {error.strerror}", str(file)
        ) from (error)
    _HELD.add(handle)
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return handle


def release(handle: int) -> None:
    """Drop the lock. Calling it twice is fine."""
    if handle in _HELD:
        _HELD.discard(handle)
        os.close(handle)


def _drop_in_child() -> None:
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_drop_in_child)
