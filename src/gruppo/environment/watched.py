"""Calling foreign code with a deadline: what hangs is left behind, what raises becomes a text.

A thread that hangs cannot be ended; it is abandoned (it is a daemon, so it does not hold up the
end of the program). What runs a model's code belongs into a sandbox, which kills it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_TEXT_LIMIT = 500


@dataclass(frozen=True, slots=True)
class Broken:
    """A call that gave no result, and why."""

    text: str


class _Call(Generic[T]):
    """A call in a thread of its own."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._outcome: T | Broken | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="gruppo-environment").start()

    def _run(self) -> None:
        try:
            self._outcome = self._function()
        except BaseException as error:  # sys.exit in an environment must not pass for a result
            self._outcome = Broken(f"{type(error).__name__}: {error}"[:_TEXT_LIMIT])
        self._done.set()

    def wait(self, deadline: float) -> T | Broken | None:
        """The result, or why there is none (of functions that return None, None)."""
        if not self._done.wait(max(0.0, deadline - time.monotonic())):
            return Broken("timeout: no answer in time")
        return self._outcome


def call_all(
    functions: Sequence[Callable[[], T]], *, seconds: float, workers: int
) -> list[T | Broken | None]:
    """Call all functions, ``workers`` at once, each for at most ``seconds``; results in order."""
    results: list[T | Broken | None] = []
    for first in range(0, len(functions), workers):
        calls = [_Call(function) for function in functions[first : first + workers]]
        deadline = time.monotonic() + seconds
        results += [call.wait(deadline) for call in calls]
    return results
