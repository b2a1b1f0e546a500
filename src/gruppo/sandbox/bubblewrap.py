"""The bubblewrap box: namespaces for everything, a file system of its own, seccomp, limits.

As an ordinary user it makes a user namespace. As root it makes none: a process that is mapped to
the host's root may write where root may (``/proc/sys``), so the driver inside changes to a user of
its own instead, and there is no ``/proc`` at all. Every namespace is named: ``--unshare-all`` would
go on without those that it cannot have.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gruppo.sandbox import filter as seccomp
from gruppo.sandbox.base import Launch, NoSandbox, Sandbox, Tools, config_of
from gruppo.sandbox.python import Library, library
from gruppo.wheel import Report

_NAMESPACES: Final = ("ipc", "pid", "net", "uts", "cgroup")
INSTALL: Final = "apt-get install bubblewrap (or dnf, pacman, apk add: the package is bubblewrap)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bubblewrap:
    """A box made by ``bwrap``."""

    kind: str = "bubblewrap"
    sealed: bool = True
    isolates: bool = True
    tools: Tools | None = None

    def prepare(self, settings: Sandbox, report: Report) -> None:
        """Nothing has to be made first."""

    def launch(self, settings: Sandbox, command: tuple[str, ...], uid: int) -> Launch:
        """Wrap the interpreter."""
        paths = self.tools.paths if self.tools else ()
        return wrapped(settings, command, uid, library(settings.interpreter), paths)

    def compiling(self, tools: Tools) -> Bubblewrap:
        """With the compiler's files beside the interpreter's."""
        return replace(self, tools=tools)


def wrapped(
    settings: Sandbox,
    command: tuple[str, ...],
    uid: int,
    found: Library,
    more: tuple[str, ...] = (),
) -> Launch:
    """``command`` in namespaces; its only files are the interpreter's library, and ``more``."""
    program = shutil.which("bwrap")
    if program is None:
        raise NoSandbox(f"sandbox: bubblewrap is not installed: {INSTALL}")
    root = os.geteuid() == 0
    descriptor = _readable(seccomp.launch())
    writable = ["/tmp"] if settings.tmp_mib else []
    config = config_of(
        settings, uid=uid if root else None, threads=settings.processes, writable=writable
    )
    argv = [
        program,
        *_isolation(root),
        *_files(found, more),
        *_private_tmp(settings),
        "--remount-ro",
        "/",
        "--chdir",
        "/",
        "--seccomp",
        str(descriptor),
        "--",
        found.python,
        *command[1:],
    ]
    folder = writable[0] if writable else ""
    return Launch(argv=tuple(argv), config=config, descriptors=(descriptor,), folder=folder)


def _isolation(root: bool) -> list[str]:
    """Namespaces and rights. Root keeps just what it takes to become another user."""
    flags = [f"--unshare-{name}" for name in _NAMESPACES]
    # as the namespace's first process, so that bwrap itself waits for it and no zombie is left
    flags += ["--as-pid-1", "--die-with-parent", "--new-session", "--clearenv", "--hostname", "box"]
    if not root:
        return ["--unshare-user", "--disable-userns", *flags]
    kept = ("CAP_SETUID", "CAP_SETGID")
    caps = [word for name in kept for word in ("--cap-add", name)]
    return [*flags, "--cap-drop", "ALL", *caps]


def _files(found: Library, more: tuple[str, ...]) -> list[str]:
    """The standard library and shared libraries, read-only; installed packages are covered."""
    paths = (*found.system, *found.own, *found.beyond(more))
    argv: list[str] = []
    # by default parents are made for their owner alone, and the driver changes its user
    for parent in sorted({str(p) for path in paths for p in Path(path).parents if str(p) != "/"}):
        if not any(parent == path or parent.startswith(f"{path}/") for path in paths):
            argv += ["--perms", "0755", "--dir", parent]
    for path in paths:
        if os.path.islink(path) and os.path.isdir(path):
            argv += ["--symlink", os.readlink(path), path]
        else:
            argv += ["--ro-bind", path, path]
    for path in found.hidden:
        argv += ["--tmpfs", path, "--remount-ro", path]
    return argv


def _private_tmp(settings: Sandbox) -> list[str]:
    if not settings.tmp_mib:
        return []
    return ["--perms", "1777", "--size", str(settings.tmp_mib << 20), "--tmpfs", "/tmp"]


def _readable(data: bytes) -> int:
    """A descriptor from which a child reads ``data``."""
    descriptor = os.memfd_create("filter", 0)
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
