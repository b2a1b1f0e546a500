"""The "lite" box: Landlock, seccomp, limits, and a user of its own when we are root.

Nothing has to be installed. There are no namespaces: a program sees that files exist (not what is
in them) and has ordinary process ids; what it could do with those is refused by the filter. It has
no place to write at all, so ``tmp_mib`` must be 0.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

from gruppo.sandbox.base import Launch, NoSandbox, Sandbox, config_of
from gruppo.sandbox.python import Library, library


@dataclass(frozen=True, slots=True, kw_only=True)
class Lite:
    """Landlock, seccomp and limits, set by the process itself before it sees a program."""

    kind: str = "lite"
    sealed: bool = True

    def launch(self, settings: Sandbox, command: tuple[str, ...], uid: int) -> Launch:
        """Start the interpreter as it is: the driver in it does the rest."""
        if settings.tmp_mib:
            raise NoSandbox(
                f'sandbox.tmp_mib = {settings.tmp_mib}: the "lite" box has no folder to write in; '
                'set it to 0, or kind = "bubblewrap"'
            )
        found = library(settings.interpreter)
        readable, listed = _split(found)
        root = os.geteuid() == 0
        config = config_of(
            settings,
            uid=uid if root else None,
            # of an ordinary user, the limit would count everything that user runs
            threads=settings.processes if root else None,
            landlock=True,
            readable=list(readable),
            listed=list(listed),
            parent=os.getpid(),
            path=found.prefix if root else None,
        )
        return Launch(argv=command, config=config)


@cache
def _split(found: Library) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Once for each interpreter: some hundred entries."""
    return found.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unboxed:
    """No box: the program has the rights of the training process. Limits hold, nothing else."""

    kind: str = "unsafe-none"
    sealed: bool = False

    def launch(self, settings: Sandbox, command: tuple[str, ...], uid: int) -> Launch:
        """Start the interpreter as it is."""
        return Launch(argv=command, config=config_of(settings, uid=None, parent=os.getpid()))
