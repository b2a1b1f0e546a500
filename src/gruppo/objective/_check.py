"""One way to refuse a bad setting; it knows no variant and no formula."""

from __future__ import annotations


def require(condition: bool, name: str, value: object, fix: str) -> None:
    """Raise ValueError naming the field, its value and the fix unless ``condition`` holds.

    >>> require(0 < 1, "PpoClip.eps_low", 0.2, "must be positive")
    >>> require(False, "PpoClip.eps_low", -0.2, "must be positive")
    Traceback (most recent call last):
    ...
    ValueError: PpoClip.eps_low = -0.2: must be positive
    """
    if not condition:
        raise ValueError(f"{name} = {value!r}: {fix}")
