"""Where an interpreter keeps its standard library: all that a box shows of the file system."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

# Shared libraries that the interpreter and its modules are linked with.
_SYSTEM: Final = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
_CACHE: Final = "/etc/ld.so.cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """An interpreter's file, prefix, folder of modules, and installed packages (hidden)."""

    python: str
    prefix: str
    modules: str
    hidden: tuple[str, ...]

    @property
    def own(self) -> tuple[str, ...]:
        """What is the interpreter's own: its file, standard library, and linked library."""
        linked = [str(path) for path in Path(self.prefix, "lib").glob("libpython*.so*")]
        zipped = [str(path) for path in Path(self.prefix, "lib").glob("python*.zip")]
        return (self.python, self.modules, *linked, *zipped)

    @property
    def system(self) -> tuple[str, ...]:
        """Folders and files of the system that it needs."""
        return tuple(path for path in (*_SYSTEM, _CACHE) if os.path.exists(path))

    def beyond(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Those of ``paths`` that are not part of all this."""
        known = tuple(f"{os.path.realpath(path)}/" for path in (*self.own, *self.system))
        return tuple(p for p in paths if not f"{os.path.realpath(p)}/".startswith(known))

    def split(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """All of it without the hidden folders: what may be read, and folders only to be listed.

        For walls that allow a folder with all that is in it, or not at all: the folders around a
        hidden one are split into their entries. Symbolic links in those give no right of their
        own: where they lead within this library, their targets have it.
        """
        hidden = [os.path.realpath(path) for path in self.hidden]
        readable: dict[str, None] = {}
        listed: dict[str, None] = {}
        left = [os.path.realpath(path) for path in (*self.own, *self.system)]
        while left:
            path = left.pop()
            if path in hidden:
                continue
            if not any(other.startswith(f"{path}/") for other in hidden):
                readable[path] = None
                continue
            listed[path] = None
            left += [entry.path for entry in os.scandir(path) if not entry.is_symlink()]
        return tuple(readable), tuple(listed)


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
    packages = ("site-packages", "dist-packages")
    hidden = [os.path.join(folder, name) for name in (*packages, "test")]
    # other interpreters' packages, beside the shared libraries
    for name in packages:
        hidden += [str(path) for top in _SYSTEM for path in Path(top).glob(f"python*/{name}")]
    # each once, by the name under which a box would show it
    found = {os.path.realpath(path): path for path in reversed(hidden) if os.path.isdir(path)}
    hidden = list(reversed(found.values()))
    return Library(python=executable, prefix=prefix, modules=folder, hidden=tuple(hidden))
