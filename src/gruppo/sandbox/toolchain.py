"""Compilers: how each is called, and which files of the system it needs.

A program is compiled in one box and run in another (``compiled``). Everything is linked statically,
so that the second box needs no file at all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from typing import Final

from gruppo.sandbox.base import NoSandbox, Tools

# One error is enough to refuse a program, and debugging information is never read.
_FLAGS: Final = ("-O2", "-static", "-s", "-w", "-fmax-errors=1", "-o", "program")
_COLLECTED: Final = ("as", "ld")  # what the compiler starts of other packages


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """A compiler: its program, the name of a source file, and the arguments around that.

    ``language`` in small letters is what its ``-x`` takes.
    """

    language: str
    program: str
    file: str
    before: tuple[str, ...]
    after: tuple[str, ...] = ()
    install: str


CPP: Final = Toolchain(
    language="C++",
    program="g++",
    file="main.cpp",
    before=("-std=gnu++20", *_FLAGS),
    install="apt-get install g++ (dnf install gcc-c++ glibc-static libstdc++-static)",
)
C: Final = Toolchain(
    language="C",
    program="gcc",
    file="main.c",
    before=("-std=gnu17", *_FLAGS),
    after=("-lm",),
    install="apt-get install gcc libc6-dev (dnf install gcc glibc-static)",
)


@cache
def find(chain: Toolchain) -> Tools:
    """The compiler on this machine.

    Raises:
        NoSandbox: it is not installed; the text says how to get it.
    """
    compiler = _compiler(chain)
    collected = [path for path in (_collected(compiler, name) for name in _COLLECTED) if path]
    paths = [compiler, *collected, *_headers(compiler, chain.language), *_own(compiler)]
    return Tools(
        argv=(compiler, *chain.before, chain.file, *chain.after),
        search=":".join(dict.fromkeys(os.path.dirname(path) for path in (compiler, *collected))),
        paths=_outermost(paths),
        file=chain.file,
    )


def _compiler(chain: Toolchain) -> str:
    """The first in the search path that is GCC itself.

    Not one that looks up GCC, as ccache and distcc do under its name: that would need files of its
    own and a shell or a cache, which no box has. GCC says by which name it was called.
    """
    others: list[str] = []
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        if (found := shutil.which(chain.program, path=folder or ".")) is None:
            continue
        compiler = os.path.realpath(found)
        if f"COLLECT_GCC={compiler}" in _ask(compiler, "-v").splitlines():
            return compiler
        others.append(found)
    if others:
        raise NoSandbox(
            f"{chain.language} programs need {chain.program} itself, and {', '.join(others)} is "
            f"another program by this name (ccache, say): {chain.install}, or add the folder of "
            "the compiler to PATH"
        )
    raise NoSandbox(
        f"{chain.language} programs need {chain.program}, which is not installed: {chain.install}"
    )


def _collected(compiler: str, name: str) -> str | None:
    """Where the compiler finds another program."""
    return shutil.which(_ask(compiler, f"-print-prog-name={name}").strip())


def _headers(compiler: str, language: str) -> list[str]:
    """The folders in which it looks for headers."""
    told = _ask(compiler, "-E", "-v", "-x", language.lower(), "-")
    _, _, rest = told.partition("search starts here:\n#include <")
    lines, _, _ = rest.partition("End of search list")
    return [line.strip() for line in lines.splitlines() if line.startswith(" ")]


def _own(compiler: str) -> list[str]:
    """Its own folder, and those of the libraries to link with."""
    told = _ask(compiler, "-print-search-dirs")
    places = dict(line.split(": ", 1) for line in told.splitlines() if ": " in line)
    libraries = places.get("libraries", "").removeprefix("=").split(":")
    return [places.get("install", ""), *libraries]


def _ask(compiler: str, *arguments: str) -> str:
    done = subprocess.run(
        [compiler, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)},
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


def _outermost(paths: list[str]) -> tuple[str, ...]:
    """What is there of ``paths``, without what lies in another of them."""
    there = {os.path.normpath(path) for path in paths if path and os.path.exists(path)} - {"/"}
    return tuple(
        path
        for path in sorted(there)
        if not any(path.startswith(f"{other}/") for other in there if other != path)
    )
