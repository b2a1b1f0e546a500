"""Forward passes that fit into memory: rows cut by a token budget, and less if that is too much.

No result depends on how rows are cut (but for the one loss that is defined by it). It knows no
model; what is done with a portion, and how half-done work is undone, its caller says.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, TypeVar, final

import torch
from torch import Tensor

from gruppo.errors import OutOfMemory
from gruppo.types import Rollout

T = TypeVar("T")
_log: Final = logging.getLogger(__name__)
# What torch's allocators say; a CPU's has no exception class of its own.
_WORDS: Final = ("can't allocate memory", "out of memory", "bad_alloc")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LOOK, _GROWTH = 8 * 2**20, 128 * 2**20  # bytes; half that growth costs a few percent more time


def micro_batches(
    rollout: Rollout, rows: Sequence[int] | range, budget: int, *, packed: bool
) -> Iterator[Tensor]:
    """Cut rows into forward passes of at most ``budget`` positions; see :func:`portions`."""
    extents = [
        Extent(
            group=int(rollout.group[row]),
            prompt=len(rollout.prompts[int(rollout.group[row])]),
            completion=int(rollout.length[row]),
        )
        for row in rows
    ]
    for part in portions(extents, budget, packed=packed):
        yield torch.tensor([rows[at] for at in part])


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What a row takes: tokens of its prompt, which its ``group`` shares, and of its completion."""

    group: int
    prompt: int
    completion: int


def portions(extents: Sequence[Extent], budget: int, *, packed: bool) -> Iterator[list[int]]:
    """Places of rows that go forward together, in at most ``budget`` positions.

    Packed, rows of a group stay together and its prompt counts once; else rows of like length go
    together, so that little is padded. One row too long for the budget still goes, alone.
    """
    size = [extent.prompt + extent.completion for extent in extents]
    every = range(len(extents))
    order = every if packed else sorted(every, key=lambda row: (-size[row], row))
    batch: list[int] = []
    used = 0
    for row in order:
        if packed:
            shared = bool(batch) and extents[batch[-1]].group == extents[row].group
            total = used + size[row] - extents[row].prompt * shared
        else:
            total = (len(batch) + 1) * size[(batch or [row])[0]]
        if batch and total > budget:
            yield batch
            batch, total = [], size[row]
        batch.append(row)
        used = total
    if batch:
        yield batch


@final
class Fitting:
    """What was found to fit: ``limit`` is the largest portion to try, None while all fitted."""

    def __init__(self, setting: str) -> None:
        """``setting`` is the recipe's name of the portion's size, for messages."""
        self.limit: int | None = None
        self._setting = setting

    def do(
        self,
        work: Callable[[int], T],
        size: int,
        *,
        total: int,
        least: int = 1,
        undo: Callable[[], None] = lambda: None,
    ) -> T:
        """Return ``work(size)``; when memory runs out, undo what it did and halve the size.

        Args:
            work: does everything, so much at a time.
            size: as the recipe says; a limit found before is respected.
            total: all there is to do at once; halving a size above it would change nothing.
            least: smallest size that still makes a difference.
            undo: called after a failed attempt.

        Raises:
            OutOfMemory: it does not fit even so.
        """
        while True:
            size = size if self.limit is None else min(size, self.limit)
            try:
                return work(size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if min(size, total) // 2 < least:
                    raise OutOfMemory(
                        f"out of memory with {self._setting} = {size}, and less would not help: "
                        "lower rollout.max_tokens, take a smaller model, or set "
                        "model.gradient_checkpointing = true or [model.lora]"
                    ) from error
            undo()
            _give_back()
            self._limit(min(size, total) // 2, size)

    def _limit(self, size: int, before: int) -> None:
        if self.limit is None:
            _log.warning(
                "out of memory: going on with %s = %d (was %d)",
                self._setting,
                size,
                before,
            )
        self.limit = size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of the device or the host, has given up.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."))
    True
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def release_heap() -> None:
    """Give pages that hold nothing back to the system, where the C library can be told to.

    glibc keeps freed memory for later. Phases of a step ask for pieces of other sizes, so what one
    of them leaves in holes would only add to the next one's peak.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@final
class HoleWatch:
    """Sees to it that work of many small pieces does not grow by holes between those that stay.

    torch asks for pieces at aligned addresses, and where one has been freed between two that stay,
    glibc cannot put another as large. Whenever the process has grown by ``_GROWTH`` bytes, which
    may be such holes or what the work keeps, pages that hold nothing are given back.
    """

    def __init__(self) -> None:
        self._level = resident_bytes()
        self._passed = 0

    def look(self, size: int) -> None:
        """To be called often, with the bytes that were asked for since, about."""
        self._passed += size
        if self._passed < _LOOK:
            return
        self._passed = 0
        if resident_bytes() > self._level + _GROWTH:
            release_heap()
            self._level = max(self._level, resident_bytes())


@cache
def keep_heap() -> None:
    """Keep what is freed for the next allocation, until ``release_heap``; for this process.

    glibc gives a large piece back at once and asks for it again: page by page, thousands of times
    in every micro-batch. What is held is what a pass has needed before; holes between pieces may
    add a little to its peak.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(_MMAP_THRESHOLD, 2**30):  # older ones refuse more than half a heap
            mallopt(_MMAP_THRESHOLD, 2**25)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    return ctypes.CDLL(None).malloc_trim if platform.libc_ver()[0] == "glibc" else None


def _give_back() -> None:
    """Free what the failed attempt left behind."""
    gc.collect()
    release_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
