"""Mini attacks, run inside a box before it is trusted. Loaded there: standard library alone.

Each is harmless where it succeeds (it asks for a right and gives it back at once), and stands for
a family of attacks that is not harmless.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any


def attack(facts: dict[str, Any]) -> list[str]:
    """Names of the mini attacks that succeeded."""
    won = []
    for name, action in _actions(facts).items():
        try:
            if action() is not False:
                won.append(name)
        except (OSError, ValueError, MemoryError, RuntimeError):
            continue
    return won


def _actions(facts: dict[str, Any]) -> dict[str, Callable[[], object]]:
    libc = ctypes.CDLL(None, use_errno=True)
    return {
        "read a file of the host": lambda: open(facts["canary"]).read(),
        "write a file of the host": lambda: open(facts["canary"], "a").close(),
        "read installed packages": lambda: any(map(_read_one, _packages(facts))),
        "make a file": lambda: _make(facts),
        "change the mode of a file": lambda: os.chmod(facts["canary"], 0o644),
        "open a kernel setting for writing": lambda: open("/proc/sys/kernel/core_pattern", "r+"),
        "connect to the host": lambda: socket.create_connection(("127.0.0.1", facts["port"]), 2),
        "start a process": _fork,
        "signal the host": lambda: [os.kill(pid, 0) for pid in facts["pids"]],
        "trace a process": lambda: libc.ptrace(0, 0, 0, 0) == 0,
        "become root": lambda: os.setuid(0),
        "make a user namespace": lambda: libc.unshare(0x10000000) == 0,
        "make a file in memory": lambda: os.memfd_create("probe"),
        "raise a limit": lambda: resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000)),
        "take twice the memory": lambda: mmap.mmap(-1, 2 * facts["memory"]),
        "read an environment": lambda: open(f"/proc/{facts['pids'][0]}/environ").read(),
    }


def _packages(facts: dict[str, Any]) -> list[str]:
    """Hidden folders, also by the way on which modules are found here."""
    ways = [os.path.join(p, os.path.basename(f)) for p in sys.path for f in facts["hidden"]]
    return [*facts["hidden"], *ways]


def _read_one(folder: str) -> bool:
    """Whether the first file somewhere in the folder can be read."""
    for path, _, names in os.walk(folder):
        for name in names[:1]:
            try:
                open(os.path.join(path, name), "rb").close()
            except OSError:
                return False
            return True
    return False


def _make(facts: dict[str, Any]) -> bool:
    for folder in facts["folders"]:
        path = os.path.join(folder, facts["token"])
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except OSError:
            continue
        os.unlink(path)
        return True
    return False


def _fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
