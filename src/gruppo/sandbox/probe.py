"""Mini attacks, run inside a box before it is trusted. Loaded there: standard library alone.

Each is harmless where it succeeds (it asks for a right and gives it back at once), and stands for
a family of attacks that is not harmless.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def attack(facts: dict[str, Any]) -> list[str]:
    """Names of the mini attacks that succeeded.

    An interpreter of the host must have what they need (``own``); one for WASI lacks most of it.
    """
    won = []
    failures = (OSError, ValueError, MemoryError, RuntimeError)
    lacking = () if facts["own"] else (ImportError, AttributeError)
    for name, action in _actions(facts).items():
        try:
            if action() is not False:
                won.append(name)
        except (*failures, *lacking):
            continue
    return won


def _actions(facts: dict[str, Any]) -> dict[str, Callable[[], object]]:
    return {
        "read a file of the host": lambda: open(facts["canary"]).read(),
        "write a file of the host": lambda: open(facts["canary"], "a").close(),
        "read installed packages": lambda: any(map(_read_one, _packages(facts))),
        "make a file": lambda: _make(facts),
        "change the mode of a file": lambda: _change_mode(facts["canary"]),
        "open a kernel setting for writing": lambda: open("/proc/sys/kernel/core_pattern", "r+"),
        "connect to the host": lambda: _module("socket").create_connection(
            ("127.0.0.1", facts["port"]), 2
        ),
        "start a process": _fork,
        "signal the host": lambda: [os.kill(pid, 0) for pid in facts["pids"]],
        "trace a process": lambda: _libc().ptrace(0, 0, 0, 0) == 0,
        "become root": lambda: os.setuid(0),
        "make a user namespace": lambda: _libc().unshare(0x10000000) == 0,
        "make a file in memory": lambda: os.memfd_create("probe"),
        "raise a limit": _raise_a_limit,
        "take twice the memory": lambda: bytearray(2 * facts["memory"]),
        "read an environment": lambda: open(f"/proc/{facts['pids'][0]}/environ").read(),
    }


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _libc() -> Any:
    return _module("ctypes").CDLL(None, use_errno=True)


def _raise_a_limit() -> None:
    resource = _module("resource")
    resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))


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


def _change_mode(path: str) -> None:
    os.chmod(path, 0o644)
    os.stat(path)  # Python for WASI says that it changed what is not there


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
