"""What every own task has in common: an item, and the protocol of its generator.

A task is a frozen record that is called with (seed, index) and returns the same item every time,
for any index: it needs no download, has no end and no state. It knows no prompt layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One generated problem, before it becomes a prompt.

    ``keys`` are the canonical forms that the held-out split goes by: two items that ask for the
    same thing in another order, wording or with other names share them. ``info`` lets a checker
    recompute the answer without reading the question.
    """

    question: str
    answer: str
    keys: tuple[str, ...]
    info: Mapping[str, object] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """Generates items by (seed, index)."""

    def __call__(self, seed: int, index: int) -> Item:
        """Return item ``index`` of the sequence under ``seed``."""
        ...


def check_range(low: int, high: int, *, least: int, most: int) -> None:
    """Refuse ranges of numbers that a task cannot be made of.

    Raises:
        ValueError: unless least <= low < high <= most.
    """
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name}: {value!r} must be a whole number")
    if not least <= low < high <= most:
        raise ValueError(
            f"low, high: {low}, {high} must be in order and between {least} and {most}"
        )


def check_choices(name: str, chosen: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse an empty choice, one that names something unknown, and repetitions.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    if isinstance(chosen, str) or not chosen:
        raise ValueError(f"{name}: {chosen!r} must be a list with some of {', '.join(allowed)}")
    for value in chosen:
        if value not in allowed:
            raise ValueError(f"{name}: {value!r} is unknown; use some of {', '.join(allowed)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{name}: {list(chosen)} names one twice; name each once")


def check_whole(name: str, value: int, *, least: int, most: int) -> None:
    """Refuse what is not a whole number in [least, most].

    Raises:
        ValueError: naming the field, the value and the range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: {value!r} must be a whole number from {least} to {most}")
