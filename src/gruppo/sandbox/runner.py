"""The process of a WASI box: it limits itself, then runs Python compiled to WebAssembly.

What the guest can reach are ``calls``. This process is the second wall: its limits are those of
the kernel, it becomes a user of its own where it can, and it kills itself when the guest's
processor time is over or the trainer has ended. That time counts from the guest's first reply on,
with which it says that it is ready. Loaded by ``bundle.BOOT``; it imports the standard library and,
from the folder that the host names, ``wasmtime``.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, final

from gruppo.sandbox.calls import REFUSED, Calls, Ended

_TICK: Final = 0.02  # seconds between looks at the clock and at the parent
_OWN: Final = 256 << 20  # bytes that this process needs besides the guest's memory
_STACK: Final = (2 << 20) - (64 << 10)  # of compiled code; wasmtime refuses 2 MiB and more
_TEXT: Final = 300
_ERROR: Final = 2000  # bytes of what is told of a crash


def main(commands: int, replies: int, pending: bytes) -> None:
    """Limit this process, start the guest, and end as it ends."""
    while b"\n" not in pending:
        pending += os.read(commands, 1 << 16)
    line, _, rest = pending.partition(b"\n")
    try:
        config = json.loads(line)
        watch = Watch(config["parent"], config["cpu_s"])
        calls = Calls(
            commands, replies, pending=rest, arguments=config["arguments"], seal=watch.seal
        )
        start = _instance(config, calls)
        _lock(config)
    except Exception as error:
        told = {"failed": f"{type(error).__name__}: {error}"[:_TEXT]}
        os.write(replies, json.dumps(told).encode() + b"\n")
        os._exit(1)
    try:
        start()
    except Ended as ended:
        os._exit(ended.status & 0xFF)
    except BaseException as error:  # a crash of the guest looks like one of any program
        os.write(2, f"{type(error).__name__}: {error}".encode(errors="replace")[:_ERROR])
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        os.abort()
    os._exit(0)


def engine(wasmtime: Any) -> Any:
    """The compiler and its settings: the same for making a module and for running it.

    Programs are ended by killing this process, which needs no help of the compiled code: checks of
    an epoch in every loop made it a fifth slower, and stop no bulk operation.
    """
    settings = wasmtime.Config()
    settings.max_wasm_stack = _STACK
    return wasmtime.Engine(settings)


@final
class Watch:
    """Kills this process when its time is over, or the process that made it has ended."""

    def __init__(self, parent: int, cpu_s: int) -> None:
        if os.getppid() != parent:
            raise OSError("the process that made this box has ended")
        self._parent, self._cpu_s = parent, cpu_s
        self._until = math.inf
        threading.Thread(target=self._run, daemon=True).start()

    def seal(self) -> None:
        """Start counting. The kernel's own limit, of whole seconds, is behind this one."""
        self._until = time.process_time() + self._cpu_s
        limit = math.ceil(self._until) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))

    def _run(self) -> None:
        while os.getppid() == self._parent and time.process_time() < self._until:
            time.sleep(_TICK)
        os.kill(os.getpid(), signal.SIGKILL)


def _instance(config: dict[str, Any], calls: Calls) -> Callable[[], object]:
    """What starts the guest."""
    sys.path.append(config["wasmtime"])
    wasmtime = importlib.import_module("wasmtime")
    machine = engine(wasmtime)
    module = wasmtime.Module.deserialize_file(machine, config["module"])
    store = wasmtime.Store(machine)
    store.set_limits(memory_size=config["memory"], instances=1, memories=1, tables=1)
    linker = wasmtime.Linker(machine)
    known = calls.functions()
    for wanted in module.imports:
        function = wasmtime.Func(store, wanted.type, known.get(wanted.name, _refuse))
        linker.define(store, wanted.module, wanted.name, function)
    exports = linker.instantiate(store, module).exports(store)
    calls.bind(store, exports["memory"])
    return lambda: exports["_start"](store)


def _refuse(*arguments: int) -> int:
    return REFUSED


def _lock(config: dict[str, Any]) -> None:
    """Bound memory and threads, forbid files, and become the box's user if there is one."""
    limits = {
        resource.RLIMIT_DATA: config["memory"] + _OWN,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if config["uid"] is not None:
        limits[resource.RLIMIT_NPROC] = 2  # this thread and the watch
    for number, value in limits.items():
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    if config["uid"] is not None:
        os.setgroups([])
        os.setregid(config["uid"], config["uid"])
        os.setreuid(config["uid"], config["uid"])
