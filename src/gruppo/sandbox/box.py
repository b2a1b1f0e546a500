"""One box from the host's side: its pipes, and what may come out of them.

A box is used for one program and never again. Everything it says is untrusted: streams are cut at
a limit, a line that is no reply to what was asked ends the box. The host never blocks on it: it
waits on all pipes at once, with a deadline.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, Final

from gruppo.sandbox import filter as seccomp
from gruppo.sandbox.base import (
    Backend,
    Binary,
    Call,
    Outcome,
    Returned,
    Sandbox,
    SandboxFailure,
    Tools,
)
from gruppo.sandbox.bundle import BOOT, payload
from gruppo.sandbox.family import GRACE, Family
from gruppo.sandbox.pipes import Pipes
from gruppo.sandbox.wire import Unsendable, check

_START_SECONDS: Final = 60.0
_HANDSHAKE: Final = 1 << 16  # bytes
_NAME: Final = 80
_FEWEST_BITS: Final = 36  # of an address, on any machine that the filter knows
_TEXT: Final = 1 << 16  # bytes of a compiler's messages, and of the line before a program
_BUILTIN_ERRORS: Final = frozenset(
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
)


class Box:
    """A started box. ``wait_ready`` first, then one job.

    Jobs are ``script``, ``load``, ``begin_tests``, ``native``, and ``compile`` in a box whose
    backend has a compiler.
    """

    def __init__(self, backend: Backend, settings: Sandbox, uid: int) -> None:
        """Start the process; the calling thread must outlive it (it dies with that thread).

        Raises:
            SandboxFailure: it could not be started.
        """
        self._settings = settings
        self._sealed = backend.sealed
        self._ended: Outcome | None = None
        self._began = time.monotonic()
        self._deadline = self._began + _START_SECONDS
        self._folder, self._scratch = "", False
        self._pipes = Pipes()
        self._start(backend, uid)

    def _start(self, backend: Backend, uid: int) -> None:
        inner = self._pipes.inner
        descriptors: tuple[int, ...] = ()
        try:
            numbers = (str(inner["commands"]), str(inner["replies"]))
            python = self._settings.interpreter
            command = (python, "-I", "-S", "-B", "-c", BOOT, *numbers)
            plan = backend.launch(self._settings, command, uid)
            descriptors = plan.descriptors
            self._folder, self._scratch = plan.folder, plan.scratch
            process = subprocess.Popen(
                plan.argv,
                stdin=inner["stdin"],
                stdout=inner["stdout"],
                stderr=inner["stderr"],
                env={},
                cwd="/",
                pass_fds=(inner["commands"], inner["replies"], *descriptors),
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self._pipes.close()
            self._tidy()
            if isinstance(error, ValueError):  # what was asked for cannot be had
                raise
            raise SandboxFailure(f"{backend.kind}: {error}") from error
        finally:
            self._pipes.hand_over()
            for descriptor in descriptors:
                os.close(descriptor)
        self._family = Family(process, starts_others=self._scratch)
        self._pipes.write(
            "commands", payload(python, plan.modules) + _line(dict(plan.config)) + plan.following
        )

    @property
    def pid(self) -> int:
        """Process id, on the host, of the outermost process."""
        return self._family.pid

    def wait_ready(self) -> None:
        """Wait until the box has taken its rights away.

        Raises:
            SandboxFailure: it could not. No candidate code has run.
        """
        self._deadline = time.monotonic() + _START_SECONDS  # a spare box may have waited for long
        reply = self._reply(_HANDSHAKE)
        if isinstance(reply, dict) and isinstance(number := reply.get("ready"), int):
            self._number = number
            return
        said = self._complaint()
        self.close()
        if isinstance(reply, dict):
            raise SandboxFailure(f"the box could not lock itself: {reply.get('failed')}")
        raise SandboxFailure(f"the box did not start ({reply.ended} {reply.code}): {said}")

    def script(self, source: str, stdin: bytes) -> Outcome:
        """Run a program as a script, to its end."""
        self._begin({"mode": "script", "source": source})
        self._pipes.write("stdin", stdin)
        return self._until(lambda: False)

    def native(self, program: Binary, stdin: bytes) -> Outcome:
        """Become a compiled program, to its end."""
        # behind the first 4 GiB, where programs lie that are linked to fixed addresses
        place = ((1 << 32) + secrets.randbelow(_free_addresses())) & ~15
        self._begin({"mode": "native", "size": len(program.data), "place": place}, program.data)
        self._pipes.write("stdin", stdin)
        return self._until(lambda: False)

    def compile(self, tools: Tools, source: str) -> Binary | Outcome:
        """Compile a program; where that fails, how.

        Raises:
            SandboxFailure: the box ended without a word of its compiler (a full disk, say).
        """
        order = {"mode": "compile", "source": source, "folder": self._folder}
        self._begin(order | {"argv": tools.argv, "search": tools.search, "file": tools.file})
        self._pipes.shut("stdin")
        limit = (self._settings.file_mib << 20) + _TEXT
        told = self._word(limit)
        if isinstance(told, Outcome):
            if told.ended in ("wall", "output"):
                return told
            raise SandboxFailure(f"no word of the compiler ({told.ended} {told.code})")
        code, seconds, size = (told.get(key) for key in ("code", "seconds", "size"))
        if not (isinstance(code, int) and isinstance(size, int) and isinstance(seconds, float)):
            return self._end("protocol", "no word of a compiler")
        if code != 0:  # the compiler tells of a part of it that was killed as of any other error
            long = seconds >= self._settings.cpu_s - 0.2
            return self._end("cpu" if long else "exit", f"status {code}")
        data = self._pipes.said["replies"]
        ended = self._until(lambda: len(data) >= size, limit)
        return Binary(data=bytes(data[:size])) if 0 < size <= len(data) else ended

    def load(self, source: str) -> Outcome | Returned:
        """Load a program whose functions will be called."""
        ident = self._begin({"mode": "serve", "source": source})
        self._pipes.shut("stdin")
        return self._returned(ident)

    def call(self, call: Call) -> Outcome | Returned:
        """Call a function of the loaded program."""
        ident = secrets.token_hex(16)
        order = {"id": ident, "name": call.name, "args": call.args, "kwargs": dict(call.kwargs)}
        self._pipes.write("commands", _line(order))
        return self._returned(ident)

    def begin_tests(self, setup: str, tests: list[str]) -> None:
        """Start trusted test code; ``next_message`` gives what it asks and says."""
        self._begin({"mode": "tests", "setup": setup, "tests": tests})
        self._pipes.shut("stdin")

    def next_message(self) -> Outcome | dict[str, Any]:
        """The next line of trusted test code."""
        return self._reply(self._settings.output)

    def answer(self, returned: Returned) -> None:
        """Answer a call that test code made."""
        if returned.error is None:
            self._pipes.write("commands", _line({"value": returned.value}))
            return
        error = {"type": returned.error, "kind": returned.kind, "text": returned.text}
        self._pipes.write("commands", _line({"error": error}))

    def kill(self) -> None:
        """End the program at once; from any thread. ``close`` is still due."""
        self._family.kill()

    def close(self) -> None:
        """End the process and everything in the box, close the pipes, and drop what it said."""
        self._family.reap(0.0)
        self._pipes.close()
        self._tidy()
        if self._ended is not None:  # whoever asked has it
            self._ended = replace(self._ended, stdout=b"", stderr=b"")

    def _complaint(self) -> str:
        """The end of what the box wrote as errors."""
        return bytes(self._pipes.said["stderr"][-400:]).decode(errors="replace").strip()

    def _tidy(self) -> None:
        if self._scratch:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, job: dict[str, Any], data: bytes = b"") -> str:
        """Send the job; once the box says "sealed", whatever happens is the program's doing."""
        ident = secrets.token_hex(16)
        settings = self._settings
        program = _filter(settings, job, self._number) if self._sealed else b""
        limits = {"cpu_s": settings.cpu_s, "file_limit": settings.file_mib << 20}
        order = {**job, **limits, "id": ident, "filter": program.hex()}
        self._deadline = time.monotonic() + settings.wall
        self._pipes.write("commands", _line(order) + data)
        reply = self._reply(_HANDSHAKE)
        if isinstance(reply, dict) and reply.get("sealed") is True:
            self._began = time.monotonic()
            return ident
        said = self._complaint()
        self.close()
        raise SandboxFailure(f"the box did not seal itself: {said}")

    def _returned(self, ident: str) -> Outcome | Returned:
        """The reply to the request ``ident``; any other line ends the box."""
        reply = self._reply(self._settings.output)
        if isinstance(reply, Outcome):
            return reply
        try:
            return _read(reply, ident)
        except (Unsendable, AttributeError) as wrong:
            return self._end("protocol", str(wrong))

    def _reply(self, limit: int) -> Outcome | dict[str, Any]:
        """The next line of replies, as JSON."""
        pending = self._pipes.said["replies"]
        ended = self._until(lambda: b"\n" in pending, limit)
        if b"\n" not in pending:
            return ended
        line, _, _ = bytes(pending).partition(b"\n")
        del pending[: len(line) + 1]
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError) as error:
            return self._end("protocol", f"no JSON: {error}"[:_NAME])
        return reply if isinstance(reply, dict) else self._end("protocol", "no JSON object")

    def _word(self, limit: int) -> Outcome | dict[str, Any]:
        """The next line of replies where other processes may outlive who sends it.

        They hold the error stream open: without this, the death of the driver would be seen when
        they end, or taken for a compiler that is slow.
        """
        said = self._pipes.said["replies"]
        self._until(lambda: b"\n" in said or not self._pipes.is_open("replies"), limit)
        return self._reply(limit) if b"\n" in said else self._ended or self._end(None)

    def _until(self, done: Callable[[], bool], limit: int = 0) -> Outcome:
        """Move data until ``done`` or the box has ended; the outcome counts in the latter case."""
        if self._ended is not None:
            return self._ended
        limit = limit or self._settings.output
        while not done():
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                return self._end("wall")
            if not self._pipes.is_talking():
                return self._end(None)
            self._pipes.wait(remaining)
            if any(len(said) > limit for said in self._pipes.said.values()):
                return self._end("output")
        return Outcome(ended="exit")

    def _end(self, ended: str | None, text: str = "") -> Outcome:
        """Kill the box and say how it ended; ``ended`` None leaves that to its exit status."""
        status = self._family.reap(GRACE if ended is None else 0.0)
        code: int | None = None
        if ended is None:
            long = time.monotonic() - self._began >= self._settings.cpu_s - 0.2
            ended, code = _read_status(status, long=long)
        self._ended = Outcome(
            ended=ended,  # type: ignore[arg-type]
            code=code,
            stdout=bytes(self._pipes.said["stdout"]),
            stderr=bytes(self._pipes.said["stderr"]),
            text=text,
        )
        return self._ended


def _filter(settings: Sandbox, job: dict[str, Any], pid: int) -> bytes:
    """The system calls that a job is left with, in the process that is ``pid`` in its box."""
    if job["mode"] == "compile":
        return seccomp.build()
    return seccomp.strict(
        pid=pid,
        threads=settings.processes > 1,
        files=settings.tmp_mib > 0,
        argv=job.get("place", 0),
    )


@cache
def _free_addresses() -> int:
    """A quarter of the addresses that a process has: the lowest, where no kernel puts anything.

    x86-64 has 47 bits of them, ARM64 from 36 to 52 by the kernel's build (39 are common on small
    boards). Libraries lie near the upper end, so that one of their addresses tells.
    """
    somewhere = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value or 0
    return 1 << max(_FEWEST_BITS, somewhere.bit_length()) - 2


def _read(reply: dict[str, Any], ident: str) -> Returned:
    """What the reply to the request ``ident`` says; ``Unsendable`` if it is none."""
    error = reply.get("error")
    if reply.get("id") != ident or not ({"value", "error"} & reply.keys()):
        raise Unsendable("a reply to nothing that was asked")
    if error is None:
        return Returned(value=check(reply.get("value")))
    texts = [error.get(key) for key in ("type", "kind", "text")]
    if not all(isinstance(text, str) for text in texts):
        raise Unsendable("an error that is none")
    name, kind, text = (_printable(str(text))[: 4 * _NAME] for text in texts)
    known = kind if kind in _BUILTIN_ERRORS else "Exception"
    return Returned(error=name[:_NAME], kind=known, text=text)


def _printable(text: str) -> str:
    """Text without control characters, which could steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read_status(code: int, *, long: bool) -> tuple[str, int]:
    """How a process ended, by its exit code (bubblewrap adds 128 to a signal's number).

    The limit of processor time kills; so may the kernel for memory, but hardly after so ``long``.
    """
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number == signal.SIGKILL and long:
        return "cpu", number
    return ("signal", number) if number else ("exit", code)
