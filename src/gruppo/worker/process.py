"""Worker processes: started when first needed, killed at a deadline, replaced.

A worker is ``child.py`` run by a fresh interpreter. Requests go to it as bytes (our own, so they
may be pickled), replies come back as one JSON line on a descriptor of their own: nothing that the
worker says is unpickled or executed. A fresh interpreter rather than ``multiprocessing``: that
would import the user's ``__main__`` (the training script) in every worker. Threads here only wait
for pipes. This module judges no answer; it reports replies and deaths.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gruppo.secret import names_secret
from gruppo.worker.child import HEADER

_PACKAGE = Path(__file__).parents[1]
# A reply holds numbers and short texts; more than this is a runaway.
_MAX_REPLY = 64 * 1024 * 1024
_START_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker answered: its reply, or the error its handler raised."""

    value: object = None
    error_kind: str | None = None
    error_text: str = ""


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that ended instead of answering.

    ``kind`` is "timeout" (the deadline passed), "died" (it ended; ``code`` is its exit status,
    negative for a signal), "start" (it never came up) or "protocol" (it wrote nonsense).
    """

    kind: str
    code: int | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a worker runs: a handler file of this package, its settings, and its environment.

    ``secrets`` names the variables that it may read although their names say that they are secret;
    it inherits all others too. None: it inherits nothing but what an interpreter needs.
    """

    handler: str
    settings: str
    secrets: tuple[str, ...] | None


class Worker:
    """One worker process and its two pipes."""

    def __init__(self, setup: Setup) -> None:
        """Start the process; it is ready once ``wait_ready`` has returned."""
        requests_out, self._requests = os.pipe()
        self._replies, replies_in = os.pipe()
        environment = _environment(setup.secrets)
        command = [sys.executable, "-P", str(Path(__file__).with_name("child.py"))]
        command += [str(_PACKAGE / setup.handler), setup.settings, json.dumps(sys.path)]
        command += [str(requests_out), str(replies_in)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=(requests_out, replies_in),
                start_new_session=True,
            )
        finally:
            os.close(requests_out)
            os.close(replies_in)
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        self._pending = bytearray()
        self.alive = True

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def wait_ready(self) -> object:
        """Return what the handler says of itself, or the Death of a worker that cannot start."""
        record = self._receive(b"", time.monotonic() + _START_SECONDS)
        if isinstance(record, dict) and "ready" in record:
            return record["ready"]
        self.kill()
        if isinstance(record, Death):
            return Death("start", record.code, f"the worker did not start ({record.kind})")
        error = record.get("error", record)
        text = error.get("text", error) if isinstance(error, dict) else error
        return Death("start", None, str(text)[:500])

    def ask(self, payload: bytes, seconds: float) -> Reply | Death:
        """Send one request and wait for its answer; the worker is dead after a Death."""
        ident = secrets.token_bytes(16)
        deadline = time.monotonic() + seconds
        data = HEADER.pack(ident, len(payload)) + payload
        while True:
            record = self._receive(data, deadline)
            data = b""
            if isinstance(record, dict) and record.get("id") not in (None, ident.hex()):
                continue  # a late line of a process that a reward function forked
            if isinstance(record, Death):
                self.kill()
                return record
            if "died" in record:  # the forked grader only: the worker goes on with another
                return Death("died", int(record["died"]))
            if isinstance(error := record.get("error"), dict):
                return Reply(None, str(error.get("kind")), str(error.get("text")))
            return Reply(record.get("reply"))

    def kill(self) -> None:
        """End the process and what it started, and close the pipes."""
        if not self.alive:
            return
        self.alive = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._requests)
        os.close(self._replies)

    def _receive(self, data: bytes, deadline: float) -> dict | Death:
        """Write ``data`` while waiting for a line; both sides are non-blocking."""
        view = memoryview(data)
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            if view:
                selector.register(self._requests, selectors.EVENT_WRITE)
            while b"\n" not in self._pending:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return Death("timeout")
                for key, _ in selector.select(remaining):
                    if key.fd == self._requests:
                        view = self._write(view)
                        if not view:
                            selector.unregister(self._requests)
                    elif not self._read():
                        return Death("died", self._exit_code())
                if len(self._pending) > _MAX_REPLY:
                    return Death("protocol", None, "the reply is too long")
        line, _, rest = bytes(self._pending).partition(b"\n")
        self._pending = bytearray(rest)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return Death("protocol", None, f"the reply is no JSON: {error}"[:300])
        return record if isinstance(record, dict) else Death("protocol", None, "no JSON object")

    def _exit_code(self) -> int | None:
        """Return the exit status after the end of the replies; None if it only closed its pipe."""
        try:
            return self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None

    def _write(self, view: memoryview) -> memoryview:
        try:
            return view[os.write(self._requests, view) :]
        except BlockingIOError:
            return view
        except BrokenPipeError:
            return view[:0]  # the reading side reports the death

    def _read(self) -> bool:
        try:
            chunk = os.read(self._replies, 1 << 20)
        except BlockingIOError:
            return True
        self._pending += chunk
        return bool(chunk)


class Pool:
    """Up to ``size`` workers of one setup, started as they are needed. Safe to use after close."""

    def __init__(self, setup: Setup, size: int) -> None:
        """Start nothing yet."""
        self._setup = setup
        self._size = size
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._info: object = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def start(self) -> object:
        """Start one worker if none was; return what its handler says of itself, or its Death."""
        if self._info is None:
            worker = Worker(self._setup)
            info = self._opened(worker)
            if isinstance(info, Death):
                return info
            self._info = info
            self._give_back(worker)
        return self._info

    def _opened(self, worker: Worker) -> object:
        """Wait until a new worker is ready; ``close`` can kill it meanwhile."""
        with self._lock:
            self._busy.add(worker)
        try:
            return worker.wait_ready()
        except BaseException:
            worker.kill()
            raise
        finally:
            with self._lock:
                self._busy.discard(worker)

    def map(
        self, payloads: Sequence[bytes], seconds: float, *, max_deaths: int | None = None
    ) -> list[Reply | Death]:
        """Ask for every payload, ``size`` at a time; results in order.

        After ``max_deaths`` deaths, or two workers that could not start, the rest is not tried and
        gets the last Death: a reward that always hangs must not hold up the run for hours.
        """
        deaths: list[Death] = []

        def one(payload: bytes) -> Reply | Death:
            starts = sum(death.kind == "start" for death in deaths)
            if starts >= 2 or (max_deaths is not None and len(deaths) >= max_deaths):
                return Death(deaths[-1].kind, deaths[-1].code, "not tried after several failures")
            outcome = self._ask(payload, seconds)
            if isinstance(outcome, Death):
                deaths.append(outcome)
            return outcome

        if self._size == 1 or len(payloads) == 1:
            return [one(payload) for payload in payloads]
        with ThreadPoolExecutor(self._size) as threads:
            return list(threads.map(one, payloads))

    def close(self) -> None:
        """Kill all workers; the next ``map`` starts new ones."""
        with self._lock:
            workers = [*self._idle, *self._busy]
            self._idle = []
        for worker in workers:
            worker.kill()

    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        with self._lock:
            return [worker.pid for worker in [*self._idle, *self._busy] if worker.alive]

    def _ask(self, payload: bytes, seconds: float) -> Reply | Death:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is None:
            worker = Worker(self._setup)
            info = self._opened(worker)
            if isinstance(info, Death):
                return info
        with self._lock:
            self._busy.add(worker)
        try:
            return worker.ask(payload, seconds)
        except BaseException:  # Ctrl-C: the reply is still to come, so the worker is of no use
            worker.kill()
            raise
        finally:
            with self._lock:
                self._busy.discard(worker)
            self._give_back(worker)

    def _give_back(self, worker: Worker) -> None:
        if worker.alive:
            with self._lock:
                self._idle.append(worker)


@cache
def pool(setup: Setup, size: int) -> Pool:
    """Return the one pool of this setup and size: records that are equal share their workers."""
    return Pool(setup, size)


def _environment(secrets: tuple[str, ...] | None) -> dict[str, str]:
    """Return a worker's environment: see ``Setup``."""
    if secrets is not None:
        return {n: v for n, v in os.environ.items() if n in secrets or not names_secret(n)}
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
