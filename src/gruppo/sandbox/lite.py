"""The "lite" box: Landlock, seccomp, limits, and a user of its own when we are root.

Nothing has to be installed. There are no namespaces: a program sees that files exist (not what is
in them) and has ordinary process ids; what it could do with those is refused by the filter. It has
no place to write at all, so ``tmp_mib`` must be 0.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from functools import cache

from gruppo.sandbox.base import Launch, NoSandbox, Sandbox, Tools, config_of
from gruppo.sandbox.python import Library, library
from gruppo.wheel import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Lite:
    """Landlock, seccomp and limits, set by the process itself before it sees a program."""

    kind: str = "lite"
    sealed: bool = True
    isolates: bool = True
    tools: Tools | None = None

    def prepare(self, settings: Sandbox, report: Report) -> None:
        """Nothing has to be made first."""

    def compiling(self, tools: Tools) -> Lite:
        """With the compiler's files, and a folder of the host that is removed afterwards."""
        return replace(self, tools=tools)

    def launch(self, settings: Sandbox, command: tuple[str, ...], uid: int) -> Launch:
        """Start the interpreter as it is: the driver in it does the rest."""
        if settings.tmp_mib and self.tools is None:
            raise NoSandbox(
                f'sandbox.tmp_mib = {settings.tmp_mib}: the "lite" box has no folder to write in; '
                'set it to 0, or kind = "bubblewrap"'
            )
        found = library(settings.interpreter)
        readable, listed = _split(found)
        root = os.geteuid() == 0
        folder = _scratch(uid if root else None) if self.tools else ""
        config = config_of(
            settings,
            uid=uid if root else None,
            # of an ordinary user, the limit would count everything that user runs
            threads=settings.processes if root else None,
            landlock=True,
            readable=[*readable, *found.beyond(self.tools.paths if self.tools else ())],
            listed=list(listed),
            writable=[folder] if folder else [],
            runs=self.tools is not None,
            parent=os.getpid(),
            path=found.prefix if root else None,
        )
        return Launch(argv=command, config=config, folder=folder, scratch=bool(folder))


def _scratch(uid: int | None) -> str:
    """A new folder, of the user ``uid``."""
    folder = tempfile.mkdtemp(prefix="gruppo-compile-")
    if uid is not None:
        os.chown(folder, uid, uid)
    return folder


@cache
def _split(found: Library) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Once for each interpreter: some hundred entries."""
    return found.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unboxed:
    """No box: the program has the rights of the training process. Limits hold, nothing else."""

    kind: str = "unsafe-none"
    sealed: bool = False
    isolates: bool = False
    tools: Tools | None = None

    def prepare(self, settings: Sandbox, report: Report) -> None:
        """Nothing has to be made first."""

    def compiling(self, tools: Tools) -> Unboxed:
        """The compiler needs no more than a folder here."""
        return replace(self, tools=tools)

    def launch(self, settings: Sandbox, command: tuple[str, ...], uid: int) -> Launch:
        """Start the interpreter as it is."""
        folder = _scratch(None) if self.tools else ""
        config = config_of(settings, uid=None, parent=os.getpid())
        return Launch(argv=command, config=config, folder=folder, scratch=bool(folder))
