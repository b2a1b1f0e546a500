"""The WASI box: Python compiled to WebAssembly, run by wasmtime in a process of its own.

It needs no kernel feature, so it is for where the other boxes do not hold: macOS, old kernels. The
program runs in an interpreter whose instructions cannot reach outside of its own memory and whose
calls are those of ``calls``; the process around it has limits of the kernel (``runner``). It is a
fixed Python (3.12) with its standard library: no threads, no processes, no ``ctypes``, no packages.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from gruppo.sandbox import interpreter
from gruppo.sandbox.base import Launch, NoSandbox, Sandbox, Tools
from gruppo.sandbox.bundle import BOOT, GUEST, RUNNER, as_text
from gruppo.wheel import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Wasi:
    """A box made by wasmtime."""

    kind: str = "wasi"
    sealed: bool = False
    isolates: bool = True

    def prepare(self, settings: Sandbox, report: Report) -> None:
        """Get the interpreter, if it is not there yet."""
        _refuse(settings)
        interpreter.prepare(report)

    def launch(self, settings: Sandbox, command: tuple[str, ...], uid: int) -> Launch:
        """Start the process that runs the guest."""
        _refuse(settings)
        module = interpreter.prepared()
        if module is None:
            raise NoSandbox(f"sandbox: Python for WASI is not there yet: {interpreter.FETCH}")
        config = {
            "wasmtime": interpreter.runtime(),
            "module": str(module),
            "arguments": ["python", "-I", "-S", "-B", "-c", BOOT, "0", "1"],
            "memory": settings.memory_mib << 20,
            "cpu_s": settings.cpu_s,
            "uid": uid if os.geteuid() == 0 else None,
            "parent": os.getpid(),
        }
        return Launch(
            argv=command, config=config, modules=RUNNER, following=as_text(GUEST) + b"{}\n"
        )

    def compiling(self, tools: Tools) -> Wasi:
        """There is no process in it to compile, or to become a compiled program."""
        raise NoSandbox(
            f'sandbox.kind = "wasi" runs Python alone, and {tools.file} is none: set language = '
            '"python", or use a box that can (sandbox.kind = "bubblewrap" or "lite", on Linux)'
        )


def _refuse(settings: Sandbox) -> None:
    """What this box cannot do.

    Raises:
        NoSandbox: the setting at fault, and the fix.
    """
    wrong = {
        f"tmp_mib = {settings.tmp_mib}": (settings.tmp_mib > 0, "has no folder to write in", "0"),
        f"processes = {settings.processes}": (settings.processes > 1, "has no threads", "1"),
        f"python = {settings.python!r}": (
            settings.python != "",
            "has an interpreter of its own (3.12)",
            '""',
        ),
    }
    for name, (is_wrong, why, fix) in wrong.items():
        if is_wrong:
            raise NoSandbox(
                f'sandbox.{name}: the "wasi" box {why}; set it to {fix}, or choose another kind'
            )
