"""Boxes for many programs at once: a few slots, each with a box that is ready before it is needed.

A slot is a thread that makes its own boxes and lives as long as the pool: a box dies with the
thread that made it, so boxes die with the pool and with the process. Each box is used once.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Final, TypeVar

from gruppo.sandbox.base import Backend, Sandbox, SandboxFailure
from gruppo.sandbox.box import Box

Item = TypeVar("Item")
Result = TypeVar("Result")
FreshBox = Callable[[], Box]

# Users of boxes, when we are root: numbers that Linux distributions leave to services made on
# the fly, so that no person and no installed service has them.
_FIRST_UID: Final = 61_500
_UIDS: Final = 3_500
_SPARE: Final = 1
_TRIES: Final = 3

_Job = tuple[Callable[[FreshBox], object], Future]
_counter = itertools.count(os.getpid() * 16)


class Pool:
    """Runs tasks that need boxes, ``workers`` at a time. Usable again after ``close``."""

    def __init__(self, backend: Callable[[], Backend], settings: Sandbox, workers: int) -> None:
        """Start nothing yet; ``backend`` is asked for when the first box is."""
        self._backend = backend
        self._settings = settings
        self._workers = workers
        self._slots: list[_Slot] = []
        self._lock = threading.Lock()
        atexit.register(self.close)

    def map(
        self, task: Callable[[FreshBox, Item], Result], items: Sequence[Item]
    ) -> list[Result | SandboxFailure]:
        """``task(fresh box maker, item)`` of every item, in order; boxes are closed for it.

        A task that the sandbox failed twice gives the failure instead of a result.
        """
        jobs: list[Future] = []
        with self._lock:
            while len(self._slots) < min(self._workers, len(items)):
                self._slots.append(_Slot(self._backend(), self._settings))
            queue: SimpleQueue[_Job] = SimpleQueue()
            for item in items:
                future: Future = Future()
                jobs.append(future)
                queue.put((lambda fresh, item=item: task(fresh, item), future))
            for slot in self._slots:
                slot.work(queue)
        try:
            return [job.result() for job in jobs]
        except BaseException:  # interrupted: nobody waits for what is still running
            self.close()
            raise

    def close(self) -> None:
        """End all slots and their boxes; the next ``map`` starts new ones."""
        with self._lock:
            slots, self._slots = self._slots, []
        for slot in slots:
            slot.close()

    def pids(self) -> list[int]:
        """Process ids of the boxes that are there."""
        with self._lock:
            return [pid for slot in self._slots for pid in slot.pids()]


class _Slot:
    """One thread with a box in use and a spare one."""

    def __init__(self, backend: Backend, settings: Sandbox) -> None:
        self._backend = backend
        self._settings = settings
        self._spare: deque[Box] = deque()
        self._used: list[Box] = []
        self._closed = False
        self._queues: SimpleQueue[SimpleQueue[_Job] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="gruppo-sandbox", daemon=True)
        self._thread.start()

    def work(self, queue: SimpleQueue[_Job]) -> None:
        """Take jobs from ``queue`` until it is empty."""
        self._queues.put(queue)

    def close(self) -> None:
        """End the boxes, and the thread after its job."""
        self._closed = True
        self._queues.put(None)
        for box in (*self._used, *self._spare):
            box.kill()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def pids(self) -> list[int]:
        """Process ids of this slot's boxes."""
        return [box.pid for box in (*self._used, *self._spare)]

    def _run(self) -> None:
        while (queue := self._queues.get()) is not None and not self._closed:
            while not self._closed:
                try:
                    job = queue.get_nowait()
                except Empty:
                    break
                self._one(*job)
        while self._spare:
            self._spare.popleft().close()

    def _one(self, task: Callable[[FreshBox], object], future: Future) -> None:
        """Do one task, with all its boxes closed before its result is told."""
        failure: SandboxFailure | None = None
        for _ in range(_TRIES):
            try:
                result = task(self._fresh)
            except SandboxFailure as error:
                failure = error
                continue
            except BaseException as error:
                future.set_exception(error)
                return
            finally:
                self._close_used()
            future.set_result(result)
            return
        future.set_result(failure)

    def _close_used(self) -> None:
        for box in self._used:
            box.close()
        self._used = []

    def _fresh(self) -> Box:
        """A ready box; the next one is started before this one is used."""
        if self._closed:
            raise SandboxFailure("the sandbox was closed")
        if not self._spare:
            self._spare.append(self._start())
        box = self._spare.popleft()
        self._used.append(box)
        while len(self._spare) < _SPARE:
            self._spare.append(self._start())
        box.wait_ready()
        return box

    def _start(self) -> Box:
        return Box(self._backend, self._settings, _FIRST_UID + next(_counter) % _UIDS)
