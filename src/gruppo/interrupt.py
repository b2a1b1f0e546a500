"""SIGINT and SIGTERM for a loop whose state must stay whole.

The first signal raises ``Interrupted`` in the main thread at once, unless the loop holds it
back because weights and bookkeeping are out of step; then it is raised on release. Where Python
ignores what is raised (in finalisers, in some callbacks from C), the signal is lost there: it is
raised on the next release, and one that comes before that counts as the first. A second signal
ends the process at once, with its children. A program whose work is done ignores them
(``whole_process``).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KILL_SECONDS = 5.0
_last: list[Callable[[], None]] = []
_installed: list[Interrupts] = []  # the innermost one last


class Interrupted(KeyboardInterrupt):
    """The user or the system asked the run to stop. No ``except Exception`` swallows it."""

    def __init__(self, signum: int) -> None:
        """Remember which signal came."""
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells count."""
        return 128 + self.signum


@dataclass(slots=True)
class Interrupts:
    """Turns signals into ``Interrupted``, except while ``hold`` is in force."""

    held: bool = False
    owner: int = field(default_factory=os.getpid)
    pending: list[int] = field(default_factory=list)
    _lost: bool = field(default=False, init=False)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM inside (in the main thread; elsewhere this does nothing).

        Raises:
            Interrupted: one that was lost, outside of here or, in the end, inside.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        if _installed and _installed[-1]._lost:
            raise _installed[-1]._told()
        before: dict[int, Callable[..., object] | int | None] = {
            number: signal.signal(number, self._on_signal) for number in SIGNALS
        }
        try:
            with self._watched():
                yield
            if self._lost:
                raise self._told()
        finally:
            for number, handler in before.items():
                if handler is not None:  # None: it was set outside of Python
                    signal.signal(number, handler)

    def hold(self) -> None:
        """From here on a first signal waits for ``release``."""
        self.held = True

    def release(self) -> None:
        """Let signals through again; raises ``Interrupted`` if one has waited."""
        self.held = False
        if self.pending:
            raise self._told()

    def told_in(self, text: str) -> Interrupted | None:
        """The signal that has been raised, if ``text`` names it."""
        raised = self.pending and not self.held
        return self._told() if raised and signal.Signals(self.pending[0]).name in text else None

    def _told(self) -> Interrupted:
        """What to raise for the first signal: it is not lost any more."""
        self._lost = False
        return Interrupted(self.pending[0])

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        if os.getpid() != self.owner:  # a forked child: nothing here is its business
            os._exit(128 + signum)
        if self.pending and not self._lost:
            _end_children()
            os._exit(128 + signum)
        self.pending.append(signum)
        told = self._told()
        if not self.held:
            raise told

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Inside, signals are this object's business, and it sees which get lost."""
        before = sys.unraisablehook

        def see(unraisable: sys.UnraisableHookArgs) -> None:
            if isinstance(unraisable.exc_value, Interrupted):
                self._lost = True
            else:
                before(unraisable)

        sys.unraisablehook = see
        _installed.append(self)
        try:
            yield
        finally:
            _installed.pop()
            sys.unraisablehook = before


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise an ``Interrupted`` as itself that came out as another error.

    Python 3.11 makes it the cause of a RuntimeError if it is raised while a class body's fields
    get their names, and a library in another language may keep its text alone: a signal during an
    import or a check would look like a defect.
    """
    try:
        yield
    except Exception as error:
        cause, seen = error.__cause__, {id(error)}
        while cause is not None and id(cause) not in seen:
            if isinstance(cause, Interrupted):
                raise cause from None
            seen.add(id(cause))
            cause = cause.__cause__
        told = _installed[-1].told_in(str(error)) if _installed else None
        if told is not None:
            raise told from None
        raise


@contextmanager
def ending_with(kill: Callable[[], None]) -> Iterator[None]:
    """Inside, a second signal calls ``kill`` before it ends the process.

    For children that neither end with this process nor are known to ``multiprocessing``. ``kill``
    runs in another thread and gets five seconds: the main one may hold the lock that it needs.
    """
    _last.append(kill)
    try:
        yield
    finally:
        _last.remove(kill)


def _end_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()
    killers = [threading.Thread(target=kill, daemon=True) for kill in _last]
    for thread in killers:
        thread.start()
    deadline = time.monotonic() + _KILL_SECONDS
    for thread in killers:
        thread.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def whole_process() -> Iterator[None]:
    """For a program's main function: signals raise ``Interrupted`` inside, and are ignored after.

    Afterwards the interpreter only has to end, which takes a second with the libraries of a run:
    a signal that comes then must not make a failure of a run that is done and saved.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts = Interrupts()
    for number in SIGNALS:
        signal.signal(number, interrupts._on_signal)
    try:
        with interrupts._watched():
            yield
    finally:
        interrupts.hold()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
