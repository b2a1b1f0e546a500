"""What tests of boxes share: where they can run, and a program in a fresh box."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from gruppo.sandbox import Backend, Outcome, Pool, Sandbox
from support.wasi import missing

linux = pytest.mark.skipif(sys.platform != "linux", reason="boxes need Linux")
needs_wasi = pytest.mark.skipif(missing() != "", reason=missing())


@contextmanager
def opened(backend: Callable[[], Backend], settings: Sandbox) -> Iterator[Pool]:
    """Boxes one after another, ended at the end."""
    pool = Pool(backend, settings, 1)
    try:
        yield pool
    finally:
        pool.close()


def script(pool: Pool, source: str, stdin: bytes = b"") -> Outcome:
    """How ``source`` ends as a program of its own with ``stdin`` to read."""
    return pool.map(lambda fresh, text: fresh().script(text, stdin), [source])[0]
