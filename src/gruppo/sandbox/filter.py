"""Seccomp filters as bytes: allow-lists in the kernel's classic BPF, made without a library.

Everything that is not allowed fails with EPERM (a program sees an error and may go on); calls of
another machine word (32-bit calls, x32) kill the process. What files a program may open is not
decided here but by the mount namespace and Landlock.

Source: Linux, ``Documentation/userspace-api/seccomp_filter.rst``; opcodes of
``linux/bpf_common.h``.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterable, Sequence
from typing import Final

from gruppo.sandbox import syscalls

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_ALLOW: Final = 0x7FFF0000
_KILL: Final = 0x80000000  # SECCOMP_RET_KILL_PROCESS
_ERRNO: Final = 0x00050000
_EPERM, _EAGAIN, _ENOSYS = 1, 11, 38
_NR, _ARCH, _ARGS = 0, 4, 16  # offsets in struct seccomp_data
_X32: Final = 0x40000000

# machine: (AUDIT_ARCH_*, column of syscalls.NUMBERS)
_MACHINES: Final = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# isatty (TCGETS), FIONREAD, FIONBIO, FIOCLEX and FIONCLEX, window size. No TIOCSTI, which types
# into a terminal, and no FIOSETOWN, which sends signals.
_IOCTLS: Final = (0x5401, 0x541B, 0x5421, 0x5451, 0x5450, 0x5413)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ. No F_SETOWN and
# F_SETSIG: together they make the kernel send any signal, SIGKILL too, to a process of one's uid.
_FCNTLS: Final = (0, 1, 2, 3, 4, 1030, 1032)
# Where flags stand in the calls that open files, and those that write: O_WRONLY, O_RDWR, O_CREAT,
# O_TRUNC. The last empties a file that is opened for reading, and Landlock sees that only since
# Linux 6.2; what may be read may be the user's own Python. So it is refused without one of the
# first two, which Landlock has always seen, where files may be written too.
_OPENS: Final = {"open": 1, "openat": 2}
_FOR_WRITING: Final = (0x1, 0x2)
_TRUNCATES: Final = 0x200
_WRITES: Final = 0x1 | 0x2 | 0x40 | _TRUNCATES
# The flags with which glibc and musl start a thread; every other clone makes a process.
_THREAD_FLAGS: Final = (0x003D0F00, 0x007D0F00)
# The flags of fork and of posix_spawn in glibc and musl: no namespace is among them.
_PROCESS_FLAGS: Final = (0x01200011, 0x4111, 0x11)
_SET_FS: Final = 0x1002  # ARCH_SET_FS: where a new program keeps what belongs to a thread
_EMPTY_PATH: Final = 0x1000  # AT_EMPTY_PATH: execute an open file

Instruction = tuple[int, int, int, int]


def machine() -> str:
    """This machine's name.

    Raises:
        ValueError: the filter knows no system calls of this machine.
    """
    name = platform.machine()
    if name not in _MACHINES:
        raise ValueError(
            f"sandbox: no system call filter for {name}; it knows {', '.join(_MACHINES)}"
        )
    return name


def strict(*, pid: int, threads: bool, files: bool, argv: int = 0) -> bytes:
    """The filter under which candidate code runs: compute, read, and write to what is open.

    Args:
        pid: process id that it may signal (with ``tgkill``, as ``abort`` does): its own.
        threads: whether it may start threads. It can never start a process.
        files: whether it may change files (where it can open any for writing: its own ``/tmp``).
            Without, none can be opened for that.
        argv: 0, or the one address of an argument list with which a file may be executed: the
            driver's, drawn at random, to become the candidate's program. That has an address space
            of its own and cannot know where the list stood, so that it cannot execute anything.
    """
    plain = [*syscalls.COMPUTE, *(syscalls.FILES if files else ())]
    checked: dict[str, tuple[int, Sequence[int]]] = {
        "ioctl": (1, _IOCTLS),
        "fcntl": (1, _FCNTLS),
        "tgkill": (0, (pid,)),
    }
    refused = {"clone3": _ENOSYS, "openat2": _ENOSYS}
    if threads:
        checked["clone"] = (0, _THREAD_FLAGS)
    else:
        refused["clone"] = _EAGAIN
    if argv:
        checked["arch_prctl"] = (0, (_SET_FS,))
    return _program(plain, checked, refused, argv=argv, writes=files)


def build() -> bytes:
    """The filter under which a compiler runs: it may write files and start its tools.

    No signals, no modes of files, no limits of others: a compiler that a program has taken over
    must not reach the user's other processes and files.
    """
    checked: dict[str, tuple[int, Sequence[int]]] = {
        "ioctl": (1, _IOCTLS),
        "fcntl": (1, _FCNTLS),
        "arch_prctl": (0, (_SET_FS,)),
        "clone": (0, _PROCESS_FLAGS),
    }
    plain = (*syscalls.COMPUTE, *syscalls.FILES, *syscalls.BUILD)
    return _program(plain, checked, {"clone3": _ENOSYS, "openat2": _ENOSYS})


def launch() -> bytes:
    """The filter of a box from its start: it may still drop its user and seal itself.

    The in-box driver runs under it, and no candidate does.
    """
    names = dict.fromkeys((*syscalls.COMPUTE, *syscalls.FILES, *syscalls.START))
    return _program(list(names), {}, {"clone3": _ENOSYS, "openat2": _ENOSYS})


def _program(
    plain: Sequence[str],
    checked: dict[str, tuple[int, Sequence[int]]],
    refused: dict[str, int],
    *,
    argv: int = 0,
    writes: bool = True,
) -> bytes:
    """Assemble: check the machine, then each call in turn, then refuse."""
    arch, column = _MACHINES[machine()]
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NR),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for name in plain:
        then = [(_RETURN, 0, 0, _ALLOW)]
        if name in _OPENS:
            then = (_truncating if writes else _reading)(_OPENS[name])
        code += _on(name, column, then)
    for name, (argument, values) in checked.items():
        code += _on(name, column, _one_of(argument, values))
    if argv:
        code += _on("execveat", column, _exactly({2: argv, 4: _EMPTY_PATH}))
    for name, errno in refused.items():
        code += _on(name, column, [(_RETURN, 0, 0, _ERRNO | errno)])
    code.append((_RETURN, 0, 0, _ERRNO | _EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _on(name: str, column: int, then: list[Instruction]) -> list[Instruction]:
    """``then`` for one call; nothing where this machine has no such call."""
    number = syscalls.NUMBERS[name][column]
    return [] if number is None else [(_EQUAL, 0, len(then), number), *then]


def _exactly(arguments: dict[int, int]) -> list[Instruction]:
    """Allow if every argument named has its value, in both halves."""
    checks = [
        check
        for argument, value in arguments.items()
        for check in ((8 * argument, value & 0xFFFFFFFF), (8 * argument + 4, value >> 32))
    ]
    code: list[Instruction] = []
    for number, (offset, half) in enumerate(checks):
        left = 2 * (len(checks) - 1 - number) + 1  # to the refusal behind the permission
        code += [(_LOAD, 0, 0, _ARGS + offset), (_EQUAL, 0, left, half)]
    return [*code, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | _EPERM)]


def _reading(argument: int) -> list[Instruction]:
    """Refuse what writes; the low half of the argument is looked at, because flags are 32 bits."""
    return [
        (_LOAD, 0, 0, _ARGS + 8 * argument),
        (_ANY_BIT, 0, 1, _WRITES),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _truncating(argument: int) -> list[Instruction]:
    """Refuse to empty a file that is not opened for writing (3, both bits, is for neither)."""
    only, both = _FOR_WRITING
    return [
        (_LOAD, 0, 0, _ARGS + 8 * argument),
        (_ANY_BIT, 0, 4, _TRUNCATES),
        (_AND, 0, 0, only | both),
        (_EQUAL, 2, 0, only),
        (_EQUAL, 1, 0, both),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _one_of(argument: int, values: Iterable[int]) -> list[Instruction]:
    """Allow if the low half of an argument is one of ``values``: the kernel reads 32 bits here."""
    code: list[Instruction] = [(_LOAD, 0, 0, _ARGS + 8 * argument)]
    for value in values:
        code += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*code, (_RETURN, 0, 0, _ERRNO | _EPERM)]
