"""Prints what runs learned, as the Markdown tables of docs/benchmarks.md.

Usage: python scripts/curves.py RUN [RUN ...]
"""

import math
import sys
from pathlib import Path

from gruppo.record import Database

EVALUATED = ("pass@1", "lenient_mean", "format_mean", "len")


def main() -> None:
    """Print held-out results before and after, and the reward of every step."""
    runs = [Path(name) for name in sys.argv[1:]]
    if not runs:
        sys.exit(__doc__)
    print(f"| run | {' | '.join(f'{name} before → after' for name in EVALUATED)} | gain ± 95 % |")
    print("|---" * (len(EVALUATED) + 2) + "|")
    for run in runs:
        print(f"| {run.name} | {held_out(run)} |")
    print("\nreward of the training batches, every second step:\n")
    for run in runs:
        series = read(run).metrics()["reward/task_mean"]
        print(f"| {run.name} | " + " ".join(f"{value:.2f}" for _, value in series[::2]) + " |")


def read(run: Path) -> Database:
    """The run's database."""
    return Database(run / "run.sqlite", read_only=True)


def held_out(run: Path) -> str:
    """One row of the table."""
    series = read(run).evaluations()
    cells = [f"{series[name][0][1]:.3f} → {series[name][-1][1]:.3f}" for name in EVALUATED]
    before, after = series["pass@1"][0][1], series["pass@1"][-1][1]
    errors = (series["pass@1_stderr"][0][1], series["pass@1_stderr"][-1][1])
    interval = 1.96 * math.hypot(*errors)
    return " | ".join([*cells, f"{after - before:+.3f} ± {interval:.3f}"])


if __name__ == "__main__":
    main()
