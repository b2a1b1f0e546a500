"""Where an interpreter keeps its standard library: all that a box shows of the file system."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

# Shared libraries that the interpreter and its modules are linked with.
_SYSTEM: Final = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
_CACHE: Final = "/etc/ld.so.cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """An interpreter's file, prefix, libraries, and folders of installed packages (hidden)."""

    python: str
    prefix: str
    library: str
    hidden: tuple[str, ...]

    @property
    def own(self) -> tuple[str, ...]:
        """What is the interpreter's own: its file, standard library, and linked library."""
        linked = [str(path) for path in Path(self.prefix, "lib").glob("libpython*.so*")]
        zipped = [str(path) for path in Path(self.prefix, "lib").glob("python*.zip")]
        return (self.python, self.library, *linked, *zipped)

    @property
    def system(self) -> tuple[str, ...]:
        """Folders and files of the system that it needs."""
        return tuple(path for path in (*_SYSTEM, _CACHE) if os.path.exists(path))

    @property
    def readable(self) -> tuple[str, ...]:
        """All of it, symbolic links resolved."""
        return tuple(dict.fromkeys(os.path.realpath(path) for path in (*self.own, *self.system)))


@cache
def library(python: str) -> Library:
    """Ask an interpreter where it is.

    Raises:
        ValueError: it does not answer.
    """
    ask = (
        "import json, os, sys, sysconfig; p = sysconfig.get_path('stdlib');"
        "print(json.dumps([os.path.realpath(sys.executable), sys.base_prefix, p]))"
    )
    done = subprocess.run(
        [python, "-I", "-S", "-c", ask], capture_output=True, timeout=60, check=False
    )
    try:
        executable, prefix, folder = json.loads(done.stdout)
    except ValueError:
        raise ValueError(f"sandbox.python = {python!r}: this is no Python interpreter") from None
    names = ("site-packages", "dist-packages", "test")
    hidden = tuple(path for name in names if os.path.isdir(path := os.path.join(folder, name)))
    return Library(python=executable, prefix=prefix, library=folder, hidden=hidden)
