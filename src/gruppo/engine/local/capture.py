"""Capturing work on a device, to be replayed without the host's part in it.

A ``Capture`` makes of a function one that does the same device work again, on the memory that the
function used. On CUDA that is a graph. What is worth capturing, and when a capture is no longer
true, is ``graphs.py``'s business.

The CUDA part has been run on no GPU yet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, final, runtime_checkable

import torch

Work = Callable[[], None]

_KEPT = 4
"""What is kept between calls takes at most one in so many bytes of a device's memory."""


@runtime_checkable
class Capture(Protocol):
    """Turns work into something that does it again."""

    @property
    def budget(self) -> int:
        """Bytes that may stay taken between calls, everything counted."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory that belongs to the captures."""
        ...

    def record(self, work: Work) -> Work:
        """What does ``work`` again; it may have been done any number of times when this returns.

        Raises:
            Exception: the work cannot be captured (it waits for the device, say).
        """
        ...

    def forget(self) -> None:
        """Free what belongs to captures that nobody holds any more."""
        ...


def capture_for(device: torch.device) -> Capture | None:
    """How to capture on ``device``; None where that is not done."""
    return CudaCapture(device) if device.type == "cuda" else None


@final
class CudaCapture:
    """CUDA graphs with one memory pool.

    A graph's results must be copied to memory outside the pool within the graph: then graphs may
    share the pool, and be replayed in any order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def budget(self) -> int:
        """A quarter of the device's memory."""
        return torch.cuda.get_device_properties(self._device).total_memory // _KEPT

    @property
    def num_bytes(self) -> int:
        """Memory of the pool."""
        pool = tuple(self._pool)
        return sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == pool
        )

    def record(self, work: Work) -> Work:
        """A graph of ``work``; see ``Capture.record``."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._warm_up(work)
            # after a failed capture torch leaves its stream current: this context does not
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._stream,
                    # what other threads do while this is recorded is not refused; but see _warm_up
                    capture_error_mode="thread_local",
                ),
            ):
                work()
        return graph.replay

    def forget(self) -> None:
        """Take a new pool: the old one is freed with its last graph, and cannot be used again."""
        self._pool = torch.cuda.graph_pool_handle()

    def _warm_up(self, work: Work) -> None:
        """Let libraries make their handles and plans, then refuse work that waits for the device.

        Refusing it here leaves nothing behind, while a capture that fails may. Torch refuses it to
        the whole process: while a capture warms up, no other thread may wait for a device.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
            with _refusing_syncs():
                work()
        current.wait_stream(self._stream)


@contextmanager
def _refusing_syncs() -> Iterator[None]:
    """Within, torch raises RuntimeError where any thread's operation would wait for a device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype, and misses some
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
