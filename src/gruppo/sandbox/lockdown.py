"""Inside a box: what the process takes away from itself before it sees a candidate's code.

Limits, the user id, Landlock, seccomp, in that order, through ``ctypes``: nothing is installed for
it. It runs once, at the start of a box, and trusts what the host sends. Loaded inside the box, so
it imports the standard library alone. Numbers are those of ``linux/landlock.h`` and
``linux/prctl.h``; system calls 444 to 446 are the same on every machine.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from typing import Any, Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SIGKILL: Final = 9
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ABI_VERSION: Final = 1  # flag of landlock_create_ruleset
_PATH_BENEATH: Final = 1
_EXECUTE: Final = 1
_LIST: Final = 1 << 3  # READ_DIR
_READ: Final = (1 << 2) | _LIST  # with READ_FILE
# How many file rights each version of the interface knows: 13, with refer, truncate, ioctl.
_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15}
_NEWEST_RIGHTS: Final = 16
# Making devices, sockets and pipes stays forbidden in a box's own folder.
_NODES: Final = (1 << 6) | (1 << 9) | (1 << 10) | (1 << 11)


def drop(config: dict[str, Any]) -> None:
    """Take away files, users and resources; ``config`` is what the host decided.

    Raises:
        OSError: something could not be taken away; the box must not be used.
    """
    ruleset = _landlock(config) if config["landlock"] else None
    _limit(config["limits"])
    if config["uid"] is not None:
        os.setgroups([])
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
    # after the change of user, which clears it
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if config["parent"] is not None and os.getppid() != config["parent"]:
        raise OSError("the process that made this box has ended")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if ruleset is not None:
        _call(_RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)


def seal(program: bytes, cpu_s: int, file: int) -> None:
    """Start counting processor time, and allow the system calls of ``program`` only, for good.

    ``file`` bounds files from here on, in bytes: until now the driver may have made one.
    """
    # a hard limit of processor time is a SIGKILL: no handler, no way round it
    _limit({"file": file, "cpu": cpu_s})
    if not program:
        return
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    kept = ctypes.create_string_buffer(header, len(header))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(kept))


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        number = _LIMITS[name]
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


_LIMITS: Final = {
    "memory": resource.RLIMIT_AS,
    "file": resource.RLIMIT_FSIZE,
    "cpu": resource.RLIMIT_CPU,
    "processes": resource.RLIMIT_NPROC,
    "open": resource.RLIMIT_NOFILE,
    "core": resource.RLIMIT_CORE,
    "locked": resource.RLIMIT_MEMLOCK,
    "queues": resource.RLIMIT_MSGQUEUE,
    "signals": resource.RLIMIT_SIGPENDING,
}


def _landlock(config: dict[str, Any]) -> int:
    """Make the rules: read below some folders, write in the box's own, no network, no signals."""
    version = _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _ABI_VERSION)
    if version < 1:
        raise OSError(
            ctypes.get_errno(), "Landlock is not available (kernel 5.13 or newer, lsm=landlock)"
        )
    handled = (1 << _RIGHTS.get(version, _NEWEST_RIGHTS)) - 1
    network = 3 if version >= 4 else 0  # bind and connect of TCP
    scoped = 3 if version >= 6 else 0  # abstract unix sockets, signals
    fields = struct.pack("=QQQ", handled, network, scoped)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _call(_CREATE_RULESET, ctypes.create_string_buffer(fields, 24), size, 0)
    reading = _READ | (_EXECUTE if config["runs"] else 0)
    for path in config["readable"]:
        _allow(ruleset, path, reading)
    for path in config["listed"]:
        _allow(ruleset, path, _LIST)
    for path in config["writable"]:
        _allow(ruleset, path, handled & ~_NODES)
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):
            rights &= ~_LIST  # for folders only
        rule = struct.pack("=Qi", rights, folder)
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.create_string_buffer(rule, 12), 0)
    finally:
        os.close(folder)


def _call(number: int, *arguments: Any) -> int:
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = _LIBC.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"system call {number}: {os.strerror(error)}")
    return int(result)


def _prctl(option: int, value: int, third: int = 0) -> None:
    longs = [ctypes.c_ulong(number) for number in (value, third, 0, 0)]
    if _LIBC.prctl(option, *longs) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
