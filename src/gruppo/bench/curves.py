"""How cost grows with the group, the prompt, the completion and the batch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gruppo.bench.measure import measure
from gruppo.bench.work import Work

CURVES: dict[str, tuple[int, ...]] = {
    "group": (4, 8, 16),
    "prompt_tokens": (64, 128, 256, 512),
    "max_tokens": (32, 64, 128, 256),
    "prompts": (2, 4, 8),
}
"""What is varied, and over which values; all else is as in the work given."""


def curve(work: Work, name: str) -> list[dict[str, Any]]:
    """Seconds of sampling and of training at each value of ``name``.

    Prompts are made up, 256 tokens long unless their length is what varies: a group's shared
    prompt must weigh something for the curve to show it.

    Raises:
        ValueError: ``name`` is not one of ``CURVES``.
    """
    if name not in CURVES:
        raise ValueError(f'curve "{name}": use one of {", ".join(CURVES)}')
    points = []
    for value in CURVES[name]:
        changed = {"prompt_tokens": work.prompt_tokens or 256, name: value}
        everything: dict[str, Any] = asdict(work) | changed
        here = Work(**everything)
        found = measure(here)
        points.append(
            {
                name: value,
                "sampling": found.seconds["sampling"],
                "training": found.seconds["step"] - found.seconds["sampling"],
                "positions": positions(here),
                "other_cpus": found.other_cpus,
            }
        )
    return points


def positions(work: Work) -> int:
    """Positions that training computes: every prompt once, every completion once."""
    return work.prompts * (work.prompt_tokens + work.group * work.max_tokens)
