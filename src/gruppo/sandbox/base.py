"""What a box is asked to do and what it says: plain records, and the protocol of a backend.

A box returns data, never verdicts: nothing here knows what a right answer is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

from gruppo.sandbox.bundle import PROCESS
from gruppo.wheel import Report

Kind = Literal["auto", "bubblewrap", "lite", "wasi", "unsafe-none"]
Ended = Literal["exit", "signal", "cpu", "wall", "output", "protocol"]


class NoSandbox(ValueError):
    """No box can be made here as asked; the text says how to get one."""


class SandboxFailure(RuntimeError):
    """A box failed before any candidate code ran in it: the sandbox's fault, nobody else's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """How untrusted programs are run: the kind of box, and the limits of each program.

    ``kind = "auto"`` takes bubblewrap, else the "lite" box (Landlock and seccomp, nothing to
    install), else "wasi" (Python compiled to WebAssembly, slower; needs wasmtime), and refuses if
    none holds. "unsafe-none" runs programs with the rights of the training process, and must be
    asked for by name.

    Time is judged by processor seconds, ``cpu_s``, which a busy machine does not shorten.
    ``wall_s`` on the clock is only a backstop, ten times as much unless given. ``memory_mib``
    bounds the address space. ``processes`` above 1 allows as many threads; no program can start a
    process. There is no file to write, unless ``tmp_mib`` makes a private ``/tmp`` (bubblewrap
    only) for files of up to ``file_mib``. ``output_mib`` bounds each of output, error output and
    results. ``python`` is the interpreter of the programs ("": the one that runs gruppo, or the one
    that is part of the "wasi" box), with its standard library alone.

    Raises:
        ValueError: a limit out of its range.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Kind = "auto"
    cpu_s: int = 2
    wall_s: float = 0.0
    memory_mib: int = 512
    processes: int = 1
    file_mib: int = 0
    output_mib: int = 1
    tmp_mib: int = 0
    python: str = ""

    def __post_init__(self) -> None:
        ranges = {
            "cpu_s": (self.cpu_s, 1, 3600),
            "memory_mib": (self.memory_mib, 64, 1 << 20),
            "processes": (self.processes, 1, 1024),
            "file_mib": (self.file_mib, 0, 1 << 16),
            "output_mib": (self.output_mib, 1, 64),
            "tmp_mib": (self.tmp_mib, 0, 1 << 14),
        }
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:
                raise ValueError(f"sandbox.{name} = {value}: must be from {low} to {high}")
        if not 0 <= self.wall_s <= 36_000:
            raise ValueError(
                f"sandbox.wall_s = {self.wall_s}: must be 0 (ten times cpu_s) to 36000 seconds"
            )
        if self.tmp_mib and not self.file_mib:
            raise ValueError(
                f"sandbox.tmp_mib = {self.tmp_mib} with file_mib = 0: no file could hold anything; "
                "set file_mib too"
            )

    @property
    def wall(self) -> float:
        """Seconds on the clock after which a program is ended."""
        return self.wall_s or 10.0 * self.cpu_s

    @property
    def output(self) -> int:
        """Bytes of each stream."""
        return self.output_mib << 20

    @property
    def interpreter(self) -> str:
        """Path of the interpreter: the base one, because a box has no virtual environment."""
        return self.python or os.path.realpath(sys.executable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """A compiler as it is found here: its command, and what of the file system it needs.

    ``argv`` is run in the box's folder, where it reads ``file`` and writes ``program``; ``search``
    is its ``PATH``.
    """

    argv: tuple[str, ...]
    search: str
    paths: tuple[str, ...]
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to start the process of a box.

    ``descriptors`` are handed to it and closed here afterwards; ``config`` is what the driver
    inside is told first, ``following`` what is sent after that; ``modules`` are what it loads, the
    last being the one that takes over; ``folder`` is where it may write, as seen inside ("":
    nowhere), and ``scratch`` says that this is a folder of the host, to be removed at the end.
    """

    argv: tuple[str, ...]
    config: Mapping[str, object]
    modules: tuple[str, ...] = PROCESS
    following: bytes = b""
    descriptors: tuple[int, ...] = ()
    folder: str = ""
    scratch: bool = False


@runtime_checkable
class Backend(Protocol):
    """One way to isolate a process."""

    @property
    def kind(self) -> str:
        """Its name in recipes."""
        ...

    @property
    def sealed(self) -> bool:
        """Whether programs run under the strict system call filter."""
        ...

    @property
    def isolates(self) -> bool:
        """Whether it is a box at all."""
        ...

    def prepare(self, settings: Sandbox, report: Report) -> None:
        """Get what is made or downloaded once, if it needs any; ``launch`` does not.

        Raises:
            NoSandbox: it cannot be had, or the settings ask for what this kind cannot do.
        """
        ...

    def launch(self, settings: Sandbox, command: tuple[str, ...], uid: int) -> Launch:
        """Say how to start ``command`` in a box; ``uid`` is a user of its own if we are root.

        Raises:
            NoSandbox: it cannot do what the settings ask for.
        """
        ...

    def compiling(self, tools: Tools) -> Backend:
        """The same for boxes that compile: the compiler can be run there, and may write files."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended, and what it wrote; ``code`` is its exit status or the signal's number.

    ``ended`` is "cpu" or "wall" (out of time), "output" (wrote too much), "protocol" (what came
    back was no reply), "signal" or "exit".
    """

    ended: Ended
    code: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """A program that a compiler made: bytes that nobody here reads."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A function to call: its name, and arguments in the JSON forms of ``wire``."""

    name: str
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """What a call gave: a checked JSON form, or the error that it raised.

    ``error`` has the exception's name, ``kind`` the nearest built-in exception, for raising it
    again elsewhere.
    """

    value: object = None
    error: str | None = None
    kind: str = ""
    text: str = ""


def config_of(
    settings: Sandbox, *, uid: int | None, threads: int | None = None, **more: object
) -> dict[str, object]:
    """What the driver in the box is told: limits (in bytes) and what else the backend decides.

    Args:
        settings: the limits.
        uid: the user to become, None to stay.
        threads: processes and threads that this user may have, None for no limit of this kind.
        more: replaces the defaults: no Landlock, nothing to write, no file to be executed,
            ``sys.path`` as it is.
    """
    mib = 1 << 20
    limits = {
        "memory": settings.memory_mib * mib,
        "open": 64,
        "core": 0,
        "locked": 0,
        "queues": 0,
        "signals": 64,
    }
    if threads is not None:
        limits["processes"] = threads
    base: dict[str, object] = {
        "uid": uid,
        "limits": limits,
        "landlock": False,
        "readable": [],
        "listed": [],
        "writable": [],
        "runs": False,
        "parent": None,
        "path": None,
    }
    return {**base, **more}
