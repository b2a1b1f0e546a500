"""Compiling the kernels and loading them: once per user, source, compiler and processor.

They are linked with the OpenMP runtime that torch has loaded already: two runtimes in one process
would keep two pools of threads that hinder each other.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import torch

from gruppo.cache import cache_folder
from gruppo.measured import processor

Kernel = Callable[..., int]
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
# fp contraction and reordered sums are what vector code needs; NaN and inf keep their meaning
_MATH = ("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros")
_TIMEOUT_S = 120
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}
_log = logging.getLogger(__name__)
TYPES: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Numbers that kernels take, and what ends the names of theirs."""


@cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None (and a log line that says why) where they cannot be had.

    ``GRUPPO_NATIVE=0`` in the environment turns them off.
    """
    if os.environ.get("GRUPPO_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _log.info("no compiled kernels, plain torch instead: %s", error)
        return None


def identity() -> str:
    """Names what was compiled, by what and for which processor; empty where there are none."""
    compiled = kernels()
    return "" if compiled is None else Path(compiled._name).stem


@cache
def kernel(name: str, kinds: str, result: type[ctypes.c_int64] | None = None) -> Kernel:
    """One of the compiled functions, for callers that know there are ``kernels``.

    Args:
        name: of the function.
        kinds: of its arguments, a letter each: p(ointer), i(nteger), f(loat), d(ouble).
        result: what it returns; less than 0 says that it found not memory enough for its work.

    Raises:
        MemoryError: when called, in that case.
    """
    compiled = kernels()
    assert compiled is not None, "asked before whether there are kernels"
    found = compiled[name]
    # declared once, because converting every argument of every call takes longer than some kernels
    found.argtypes = [_KINDS[kind] for kind in kinds]
    found.restype = result
    if result is not None:
        found.errcheck = _enough  # pyrefly: ignore[bad-assignment]
    return found


def _enough(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    """``result``, if there was memory enough (ctypes asks)."""
    del arguments
    if result < 0:
        raise MemoryError(f"{function.__name__}: not enough memory for what it computes in")
    return result


def _compiled() -> Path:
    """The shared object, made if it is not in the user's cache."""
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise OSError(f"no C++ compiler found (looked for {', '.join(_COMPILERS)})")
    sources = _sources()
    runtime = _openmp()
    parts = (*sources, *sources.values(), compiler, *_FLAGS, *_MATH, str(runtime), processor())
    identity = "\0".join(parts)
    target = cache_folder() / "native" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        _compile(compiler, sources, runtime, target)
    for path in (target.parent, target):
        _refuse_foreign(path)
    return target


def _sources() -> dict[str, str]:
    """The C++ files of this package, by name."""
    found = sorted(files("gruppo.native").iterdir(), key=lambda file: file.name)
    return {
        file.name: file.read_text(encoding="utf-8")
        for file in found
        if file.name.endswith((".cpp", ".h"))
    }


def _refuse_foreign(path: Path) -> None:
    """Load no code that another user could have put there."""
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{path} belongs to, or can be written by, other users")


def _compile(compiler: str, sources: dict[str, str], runtime: Path | None, target: Path) -> None:
    """Compile next to ``target`` and rename, so that it is whole or not there."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "kernels.so"
        for name, text in sources.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        code = [str(Path(folder) / name) for name in sources if name.endswith(".cpp")]
        link = [str(runtime)] if runtime else []
        command = [compiler, *_FLAGS, *_MATH, *code, "-o", str(made), *link]
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        if ran.returncode:
            raise OSError(f"{compiler} failed: {ran.stderr.strip()[-500:]}")
        made.replace(target)


def _openmp() -> Path | None:
    """File of the OpenMP runtime in this process; None if it is not known."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(("libgomp", "libomp", "libiomp")):
            return path
    return None
