"""The code that a box needs, in one piece that is sent into it: no file of ours is in the box."""

from __future__ import annotations

import importlib.util
import json
import marshal
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Final

_FOLDER: Final = Path(__file__).parent
PROCESS: Final = ("wire", "lockdown", "inside", "process")
RUNNER: Final = ("calls", "runner")
GUEST: Final = ("wire", "inside", "guest")

# What annotations alone name is not imported in a box, where nothing evaluates them and every
# start would pay for it: a tenth of a WASI guest's. ``final`` is called, so its lines stay, and so
# does collections.abc: with it loaded, programs may import collections alone and name its ``abc``.
_ANNOTATIONS: Final = re.compile(r"^from typing import (?!.*\bfinal\b).+$", re.MULTILINE)

# Reads a length and that many bytes from a descriptor, makes our modules, and hands over to the
# last of them.
BOOT: Final = """
import sys, marshal, types, os
commands, replies = int(sys.argv[1]), int(sys.argv[2])
data = b""
while len(data) < 8 or len(data) < 8 + int.from_bytes(data[:8], "big"):
    chunk = os.read(commands, 1 << 16)
    if not chunk:
        os._exit(1)
    data += chunk
size = int.from_bytes(data[:8], "big")
for name in ("gruppo", "gruppo.sandbox"):
    module = types.ModuleType(name)
    module.__path__ = []
    sys.modules[name] = module
for name, code in marshal.loads(data[8:8 + size]):
    module = types.ModuleType("gruppo.sandbox." + name)
    sys.modules[module.__name__] = module
    setattr(sys.modules["gruppo.sandbox"], name, module)
    exec(code, module.__dict__)
module.main(commands, replies, data[8 + size:])
"""


@cache
def payload(python: str, names: tuple[str, ...]) -> bytes:
    """The modules as the bytes that ``BOOT`` reads, compiled if ``python`` reads our byte code.

    Raises:
        OSError: there is no such interpreter.
        ValueError: it is none, or older than 3.9.
    """
    if magic(python) != importlib.util.MAGIC_NUMBER:
        return as_text(names)
    codes = [
        (name, compile(text, f"<box {name}>", "exec", dont_inherit=True))
        for name, text in _texts(names)
    ]
    return _framed(marshal.dumps(codes))


@cache
def as_text(names: tuple[str, ...]) -> bytes:
    """The same for an interpreter of any version."""
    return _framed(marshal.dumps(_texts(names), 2))  # a version that every interpreter reads


def _texts(names: tuple[str, ...]) -> list[tuple[str, str]]:
    texts = [(name, (_FOLDER / f"{name}.py").read_text(encoding="utf-8")) for name in names]
    return [(name, _ANNOTATIONS.sub("", text)) for name, text in texts]


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, "big") + data


@cache
def magic(python: str) -> bytes:
    """The number of the byte code that an interpreter reads."""
    ask = (
        "import importlib.util, json, sys;"
        "print(json.dumps([list(sys.version_info[:2]), importlib.util.MAGIC_NUMBER.hex()]))"
    )
    answer = subprocess.run(
        [python, "-I", "-S", "-c", ask], capture_output=True, timeout=60, check=False
    )
    try:
        version, number = json.loads(answer.stdout)
    except ValueError:
        raise ValueError(f"sandbox.python = {python!r}: this is no Python interpreter") from None
    if tuple(version) < (3, 10):
        raise ValueError(f"sandbox.python = {python!r}: Python 3.10 or newer is needed")
    return bytes.fromhex(number)
