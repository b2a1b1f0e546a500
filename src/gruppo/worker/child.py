"""The program that a worker process runs. It is started as a script, never imported.

It loads one handler (``reward/child_math.py``, say), then answers requests: a frame
of 16 bytes id and 8 bytes length, then that many bytes, comes in on one descriptor; one JSON line
``{"id", "reply"}`` or ``{"id", "error"}`` goes out on another. Standard output and input belong to
nobody, so what a reward function prints cannot be taken for an answer. Only the standard library
is imported here: a worker must be up quickly, without torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

HEADER = struct.Struct("!16sQ")
_CHECKS = 2000
_REPLACE = 75


def load(path: str, name: str) -> ModuleType:
    """Import the file at ``path`` under ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def read_exactly(descriptor: int, size: int) -> bytes | None:
    """Read ``size`` bytes; None at the end of the stream."""
    chunks: list[bytes] = []
    while size:
        chunk = os.read(descriptor, min(size, 1 << 20))
        if not chunk:
            return None
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def send(descriptor: int, record: dict) -> None:
    """Write one JSON line, whole."""
    data = memoryview(json.dumps(record, default=lambda v: {"unusable": type(v).__name__}).encode())
    for part in (data, memoryview(b"\n")):
        view = part
        while view:
            view = view[os.write(descriptor, view) :]


def describe(error: BaseException) -> dict[str, str]:
    """Return an exception as plain data."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    kinds = (("memory", MemoryError), ("recursion", RecursionError), ("exit", SystemExit))
    kind = next((name for name, type_ in kinds if isinstance(error, type_)), "exception")
    text = f"{type(error).__name__}: {error}"[:400]
    return {"kind": kind, "text": text + where}


def serve(handle: Callable[[bytes], object], requests: int, replies: int, most: int = -1) -> bool:
    """Answer requests until the stream ends; True if it has not, after ``most`` requests."""
    owner = os.getpid()
    while most != 0 and (header := read_exactly(requests, HEADER.size)) is not None:
        most -= 1
        ident, size = HEADER.unpack(header)
        payload = read_exactly(requests, size)
        if payload is None:
            return False
        try:
            answer = {"id": ident.hex(), "reply": handle(payload)}
        except (MemoryError, RecursionError) as error:  # what is left of this process is doubtful
            answer = {"id": ident.hex(), "error": describe(error)}
            most = 0 if most > 0 else most
        except BaseException as error:  # sys.exit in a reward function is its error, not our end
            answer = {"id": ident.hex(), "error": describe(error)}
        if os.getpid() != owner:  # a copy that the reward function forked must not answer too
            os._exit(0)
        try:
            send(replies, answer)
        except (TypeError, ValueError, RecursionError) as error:
            send(replies, {"id": ident.hex(), "error": describe(error)})
    return most == 0


def serve_forked(handle: Callable[[bytes], object], requests: int, replies: int) -> None:
    """Answer requests in a forked copy; when it dies, say so and fork another (a few ms).

    A copy is also replaced after ``_CHECKS`` requests: caches that grow for days would reach the
    memory limit, and innocent answers would be blamed.
    """
    while True:
        pid = os.fork()
        if pid == 0:
            os._exit(_REPLACE if serve(handle, requests, replies, _CHECKS) else 0)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:  # the stream of requests ended
            return
        if code != _REPLACE:
            send(replies, {"died": code})


def main() -> None:
    """Run the worker: argv is handler file, its settings and sys.path as JSON, two descriptors."""
    handler, settings, path, requests, replies = sys.argv[1:]
    sys.path[:] = json.loads(path)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError, ValueError, OSError):  # no core files; not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        module = load(handler, "gruppo_handler")
        handle, info = module.make(json.loads(settings))
    except BaseException as error:
        send(int(replies), {"error": describe(error)})
        return
    send(int(replies), {"ready": info})
    (serve_forked if module.FORK else serve)(handle, int(requests), int(replies))


if __name__ == "__main__":
    main()
