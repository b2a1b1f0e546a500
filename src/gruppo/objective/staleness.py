"""Rules of asynchronous training: how old a sample is, and when a new one may start.

Pure arithmetic on version numbers; queues, threads and engines are elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence


def staleness(versions: Sequence[int], current: int) -> int:
    """Current policy version minus the version of the *oldest* token; 0 without tokens.

    A partial rollout mixes versions; its oldest token is the most off-policy one.

    >>> staleness([7, 8, 9], current=10)
    3
    """
    return current - min(versions, default=current)


def is_fresh(versions: Sequence[int], current: int, *, max_staleness: int) -> bool:
    """True if the sample is at most ``max_staleness`` versions old."""
    return staleness(versions, current) <= max_staleness


def may_start(number: int, *, batch: int, version: int, max_staleness: int) -> bool:
    """True if sample ``number`` (from 1) may start now: ⌊(number − 1)/batch⌋ ≤ version + η.

    It bounds staleness at the time of consumption, because samples are consumed ``batch`` per
    version. Source: AReaL, arXiv 2505.24298, eq. 3.

    >>> [may_start(n, batch=4, version=2, max_staleness=1) for n in (16, 17)]
    [True, False]
    """
    if batch < 1:
        raise ValueError(f"batch = {batch} must be at least 1 sample per version")
    return (number - 1) // batch <= version + max_staleness
