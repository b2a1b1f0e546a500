"""What a WASI guest may ask of the process that runs it, and nothing else.

Its three streams, the time, random bytes, sleep, its end. There is no file system, no socket and no
environment to be isolated, because no function of those exists (the standard library is inside the
interpreter's own memory). Every number that comes from the guest is taken to be hostile: an address
outside of its memory ends it, and no call makes this process hold more than 64 KiB of its own.

Loaded by ``bundle.BOOT`` into that process; it imports the standard library alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final, final

REFUSED: Final = 76
"""The error number of what is not allowed."""
_NOT_OPEN, _INVALID, _BROKEN, _NO_SEEK = 8, 28, 64, 70
_CHUNK: Final = 1 << 16  # bytes that one call moves at most
_VECTORS: Final = 64
_WORD: Final = 0xFFFFFFFF  # numbers come with a sign; addresses and sizes have none
_READ_OR_WRITE: Final = (1 << 1) | (1 << 6)  # rights of a descriptor: fd_read, fd_write
_CLOCKS: Final[dict[int, Callable[[], int]]] = {
    0: time.time_ns,
    1: time.monotonic_ns,
    2: time.process_time_ns,
    3: time.process_time_ns,
}


class Ended(Exception):
    """The guest asked to end, with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@final
class Calls:
    """The functions that the guest may call; each returns a WASI error number, 0 for none.

    The guest begins with the host's commands as descriptor 0 and our replies as 1; ``fd_sync`` of
    one makes it this process's standard stream, for good.

    Args:
        commands: what it reads first; ``pending`` has been read of it.
        replies: what it writes to first; ``seal`` is called once, before the first byte.
        pending: the beginning of the commands.
        arguments: its command line.
        seal: starts the clock of processor time.
    """

    def __init__(
        self,
        commands: int,
        replies: int,
        *,
        pending: bytes,
        arguments: list[str],
        seal: Callable[[], None],
    ) -> None:
        self._files = {0: commands, 1: replies, 2: 2}
        self._later = {0: 0, 1: 1}
        self._pending = pending
        self._arguments = [text.encode() + b"\0" for text in arguments]
        self._seal: Callable[[], None] | None = seal
        self._memory: Any = None
        self._store: Any = None

    def bind(self, store: Any, memory: Any) -> None:
        """Say where the guest's memory is."""
        self._store, self._memory = store, memory

    def functions(self) -> dict[str, Callable[..., int]]:
        """By their names; all others are refused."""
        own = (
            self.args_get,
            self.args_sizes_get,
            self.environ_sizes_get,
            self.clock_time_get,
            self.clock_res_get,
            self.fd_close,
            self.fd_fdstat_get,
            self.fd_prestat_get,
            self.fd_read,
            self.fd_seek,
            self.fd_sync,
            self.fd_write,
            self.poll_oneoff,
            self.proc_exit,
            self.random_get,
        )
        return {function.__name__: function for function in own}

    def args_sizes_get(self, count: int, size: int) -> int:
        """Number and bytes of the arguments."""
        self._put(count, len(self._arguments), 4)
        self._put(size, sum(map(len, self._arguments)), 4)
        return 0

    def args_get(self, places: int, text: int) -> int:
        """The arguments, and where each begins."""
        for number, argument in enumerate(self._arguments):
            self._put(places + 4 * number, text, 4)
            self._write(text, argument)
            text += len(argument)
        return 0

    def environ_sizes_get(self, count: int, size: int) -> int:
        """An empty environment."""
        self._put(count, 0, 4)
        self._put(size, 0, 4)
        return 0

    def clock_time_get(self, clock: int, precision: int, place: int) -> int:
        """Nanoseconds of a clock."""
        if clock not in _CLOCKS:
            return _INVALID
        self._put(place, _CLOCKS[clock](), 8)
        return 0

    def clock_res_get(self, clock: int, place: int) -> int:
        """A microsecond."""
        self._put(place, 1000, 8)
        return 0

    def random_get(self, place: int, size: int) -> int:
        """Random bytes."""
        size &= _WORD
        while size > 0:
            some = min(size, _CHUNK)
            self._write(place, os.urandom(some))
            place, size = place + some, size - some
        return 0

    def fd_close(self, number: int) -> int:
        """Close a stream."""
        if number not in self._files:
            return _NOT_OPEN
        self._later.pop(number, None)
        os.close(self._files.pop(number))
        return 0

    def fd_sync(self, number: int) -> int:
        """Change from the host's pipe to the program's stream."""
        if number not in self._later or number not in self._files:
            return _INVALID
        os.close(self._files[number])
        self._files[number] = self._later.pop(number)
        return 0

    def fd_fdstat_get(self, number: int, place: int) -> int:
        """A stream of unknown kind that can be read or written."""
        if number not in self._files:
            return _NOT_OPEN
        self._put(place, 0, 8)
        self._put(place + 8, _READ_OR_WRITE, 8)
        self._put(place + 16, 0, 8)
        return 0

    def fd_prestat_get(self, number: int, place: int) -> int:
        """No folder is open."""
        return _NOT_OPEN

    def fd_seek(self, number: int, offset: int, origin: int, place: int) -> int:
        """Pipes have no place."""
        return _NO_SEEK if number in self._files else _NOT_OPEN

    def fd_read(self, number: int, vectors: int, count: int, place: int) -> int:
        """Read what there is, into the first buffer that is not empty."""
        if number not in self._files:
            return _NOT_OPEN
        for address, size in self._vectors(vectors, count):
            if size:
                data = self._take(number, min(size, _CHUNK))
                self._write(address, data)
                self._put(place, len(data), 4)
                return 0
        self._put(place, 0, 4)
        return 0

    def fd_write(self, number: int, vectors: int, count: int, place: int) -> int:
        """Write the first buffers, in part if they are large."""
        if number not in self._files:
            return _NOT_OPEN
        if number == 1 and self._seal is not None:
            self._seal()
            self._seal = None
        data = b""
        for address, size in self._vectors(vectors, count):
            data += self._read(address, min(size, _CHUNK - len(data)))
        try:
            self._put(place, os.write(self._files[number], data), 4)
        except BrokenPipeError:
            return _BROKEN
        return 0

    def poll_oneoff(self, asked: int, told: int, count: int, place: int) -> int:
        """Sleep until the first of some times; descriptors are always ready."""
        if not 0 < count <= _VECTORS:
            return _INVALID
        waits: list[float] = []
        for number in range(count):
            entry = self._read(asked + 48 * number, 48)
            waits.append(_seconds(entry) if entry[8] == 0 else 0.0)
        first = min(range(count), key=lambda number: waits[number])
        time.sleep(min(max(waits[first], 0.0), 3600.0))
        entry = self._read(asked + 48 * first, 48)
        self._write(told, entry[:8] + bytes(2) + entry[8:9] + bytes(21))
        self._put(place, 1, 4)
        return 0

    def proc_exit(self, status: int) -> int:
        """End."""
        raise Ended(status)

    def _take(self, number: int, size: int) -> bytes:
        if number in self._later and self._pending:
            data, self._pending = self._pending[:size], self._pending[size:]
            return data
        return os.read(self._files[number], size)

    def _vectors(self, place: int, count: int) -> list[tuple[int, int]]:
        """Addresses and sizes of buffers."""
        data = self._read(place, 8 * max(0, min(count, _VECTORS)))
        words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
        return list(zip(words[::2], words[1::2], strict=True))

    def _read(self, place: int, size: int) -> bytes:
        place &= _WORD
        data = bytes(self._memory.read(self._store, place, place + size))
        if len(data) != size:
            raise IndexError("outside of the memory")
        return data

    def _write(self, place: int, data: bytes) -> None:
        self._memory.write(self._store, data, place & _WORD)

    def _put(self, place: int, number: int, size: int) -> None:
        self._write(place, number.to_bytes(size, "little"))


def _seconds(entry: bytes) -> float:
    """How long a subscription to a clock asks to wait."""
    clock = int.from_bytes(entry[16:20], "little")
    until = int.from_bytes(entry[24:32], "little")
    if entry[40] & 1:  # a point in time
        until -= _CLOCKS.get(clock, time.monotonic_ns)()
    return until / 1e9
