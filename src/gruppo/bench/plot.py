"""The scaling curves as a picture, by matplotlib (extra ``plot``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(curves: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """One panel a curve: seconds of sampling and training, and what positions alone would say.

    Raises:
        ImportError: matplotlib is not there; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'the plot needs matplotlib: pip install "gruppo[plot]" (the JSON is written)'
        ) from error
    figure = Figure(figsize=(4 * len(curves), 3.2), layout="constrained")
    for axis, (name, points) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        values = [point[name] for point in points]
        for phase in ("sampling", "training"):
            axis.plot(values, [point[phase] for point in points], marker="o", label=phase)
        first = points[0]
        scale = first["training"] / first["positions"]
        axis.plot(values, [p["positions"] * scale for p in points], ":", label="positions")
        axis.set(xlabel=name, ylabel="seconds", ylim=(0, None))
        axis.legend()
    figure.savefig(output)
