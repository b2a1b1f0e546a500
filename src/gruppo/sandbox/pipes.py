"""The pipes of a box from the host's side: bytes in and out, without ever blocking.

What a box says piles up here until it is taken; how much of it is too much, and what it means, is
for ``box.py`` to say.
"""

from __future__ import annotations

import os
import selectors
from typing import Final, final

_CHUNK: Final = 1 << 16
_NAMES: Final = ("commands", "replies", "stdin", "stdout", "stderr")
_INWARD: Final = ("commands", "stdin")


@final
class Pipes:
    """Five pipes: ``commands`` and ``stdin`` into the box, the others out of it.

    ``inner`` are the box's ends by name, to be given to its process and closed by ``hand_over``.
    ``said`` is what has come out of each outward pipe.
    """

    def __init__(self) -> None:
        pairs = {name: os.pipe() for name in _NAMES}
        self.inner = {n: pair[0 if n in _INWARD else 1] for n, pair in pairs.items()}
        self.said = {name: bytearray() for name in _NAMES if name not in _INWARD}
        self._open = {pair[1 if n in _INWARD else 0]: n for n, pair in pairs.items()}
        self._sending: dict[int, memoryview] = {}
        self._selector = selectors.DefaultSelector()
        for descriptor, name in self._open.items():
            os.set_blocking(descriptor, False)
            if name not in _INWARD:
                self._selector.register(descriptor, selectors.EVENT_READ)

    def hand_over(self) -> None:
        """Close the box's ends here: its process has them, or was never started."""
        for descriptor in self.inner.values():
            os.close(descriptor)
        self.inner = {}

    def is_talking(self) -> bool:
        """Whether anything may still come out."""
        return bool(set(self._open.values()) & self.said.keys())

    def is_open(self, name: str) -> bool:
        """Whether one pipe is."""
        return name in self._open.values()

    def wait(self, seconds: float) -> None:
        """Move what can be moved; wait for something at most so long."""
        for key, _ in self._selector.select(seconds):
            self._move(key.fd)

    def write(self, name: str, data: bytes) -> None:
        """Queue data for the box, and send what goes at once; nothing if it closed its end."""
        for descriptor in self._named(name):
            rest = bytes(self._sending.pop(descriptor, b"")) + data
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
            self._sending[descriptor] = memoryview(rest)
            self._selector.register(descriptor, selectors.EVENT_WRITE)
            self._flush(descriptor)

    def shut(self, name: str) -> None:
        """Close one pipe, if it is open."""
        for descriptor in self._named(name):
            self._forget(descriptor)

    def close(self) -> None:
        """Close all of them, and drop what came out."""
        for descriptor in list(self._open):
            self._forget(descriptor)
        self._selector.close()
        for said in self.said.values():
            said.clear()

    def _named(self, name: str) -> list[int]:
        return [descriptor for descriptor, known in self._open.items() if known == name]

    def _move(self, descriptor: int) -> None:
        name = self._open.get(descriptor)
        if name is None:  # closed meanwhile
            return
        if name in _INWARD:
            self._flush(descriptor)
            return
        try:
            chunk = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return
        self.said[name] += chunk
        if not chunk:
            self._forget(descriptor)

    def _flush(self, descriptor: int) -> None:
        view = self._sending[descriptor]
        try:
            view = view[os.write(descriptor, view) :] if view else view
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._forget(descriptor)
            return
        self._sending[descriptor] = view
        if not view:
            self._selector.unregister(descriptor)
            del self._sending[descriptor]
            if self._open[descriptor] == "stdin":
                self._forget(descriptor)  # the end of the input

    def _forget(self, descriptor: int) -> None:
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)
        self._sending.pop(descriptor, None)
        del self._open[descriptor]
        os.close(descriptor)
