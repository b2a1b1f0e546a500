"""``gruppo bench``: measure this machine, print a table, write JSON and a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gruppo.bench.curves import CURVES, curve
from gruppo.bench.machine import machine
from gruppo.bench.measure import Measured, measure
from gruppo.bench.versus import Trl, versus_trl
from gruppo.bench.work import Work, device_of


def run(
    work: Work,
    *,
    curves: tuple[str, ...],
    trl: Trl | None,
    rounds: int,
    output: Path | None,
    console: Console,
) -> int:
    """Measure ``work``; with ``trl`` TRL in turn with it; ``curves``: how cost grows."""
    if unknown := [name for name in curves if name not in CURVES]:
        raise ValueError(f'curves = "{unknown[0]}": use {", ".join(CURVES)}')
    here = machine(device_of(work))
    console.print(_about(here.name, here.threads, here.gflops), highlight=False)
    found: dict[str, Any] = {"machine": asdict(here)}
    if trl is not None:
        say = lambda text: console.print(text, highlight=False)  # noqa: E731
        compared = versus_trl(work, trl=trl, rounds=rounds, gflops=here.gflops, report=say)
        console.print(_compared(compared))
        found["versus_trl"] = compared
    else:
        measured = measure(work, gflops=here.gflops)
        console.print(_measured(measured))
        found["measured"] = asdict(measured)
    found["curves"] = {name: curve(work, name) for name in curves}
    for name, points in found["curves"].items():
        console.print(_curve(name, points))
    if output is not None:
        _write(output, found, console)
    return 0


def _about(name: str, threads: int, gflops: dict[str, float]) -> str:
    peaks = ", ".join(f"{kind} {value:.0f} GFLOP/s" for kind, value in gflops.items())
    return f"{name}, {threads} threads; matrix products: {peaks}"


def _measured(measured: Measured) -> Table:
    table = Table("phase", "seconds", "of the peak", box=None)
    for phase, seconds in measured.seconds.items():
        share = measured.utilisation.get(phase)
        table.add_row(phase, f"{seconds:.3f}", "" if share is None else f"{share:.0%}")
    table.add_section()
    table.add_row("sampled tokens/s", f"{measured.sampled_per_s:.0f}")
    table.add_row("trained tokens/s", f"{measured.trained_per_s:.0f}")
    table.add_row("peak memory, GiB", f"{measured.peak_gib:.2f}")
    table.add_row("keys and values, GiB", f"{measured.cache_gib:.3f}")
    table.add_row("tokens whose activations are kept", f"{measured.kept_tokens:,}")
    table.add_row("lost to padding", f"{measured.padding:.0%}")
    table.add_row("CPUs used by others", f"{measured.other_cpus:.2f}")
    return table


def _compared(compared: dict[str, Any]) -> Table:
    table = Table("phase", "TRL s", "gruppo s", "times faster", box=None)
    for phase, times in compared["times_faster"].items():
        trl, ours = (compared["seconds"][name][phase] for name in ("trl", "gruppo"))
        table.add_row(phase, f"{trl:.2f}", f"{ours:.2f}", f"{times:.2f}")
    memory = compared["peak_gib"]
    row = (f"{memory['trl']:.2f}", f"{memory['gruppo']:.2f}")
    table.add_row("peak memory, GiB", *row, f"{1 / compared['memory_ratio']:.2f}")
    return table


def _curve(name: str, points: list[dict[str, Any]]) -> Table:
    table = Table(name, "sampling s", "training s", "positions", box=None)
    for point in points:
        sampling, training = f"{point['sampling']:.2f}", f"{point['training']:.2f}"
        table.add_row(str(point[name]), sampling, training, f"{point['positions']:,}")
    return table


def _write(output: Path, found: dict[str, Any], console: Console) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    console.print(f"written: {output}", highlight=False)
    if found["curves"]:
        from gruppo.bench.plot import plot

        picture = output.with_suffix(".svg")
        plot(found["curves"], picture)
        console.print(f"written: {picture}", highlight=False)
