"""Checks preflight against what is then measured: on variants of a recipe, each in new processes.

Usage: python scripts/preflight_coverage.py [--recipe quickstart] [--steps 12] [--groups 48]
           [--only NAME ...] [--set KEY=VALUE ...] [--output FILE]

For each variant: `gruppo preflight --json`, then `gruppo train` of so many steps with a learning
rate of 0, so that the model measured is the one that was tried. Compared are the share of dead
groups and of cut completions over all steps (inside the 95 % interval?), the peak memory of the
process (within 15 %?) and the median time of a step (within 30 %?). Ten variants of the quick start
take about half an hour on two idle cores; timings mean nothing on a busy machine.

Every variant has a seed of its own: with one for all, a strange draw of problems would be in each.
The measured share is itself a sample, of steps x prompts_per_step groups; preflight is told the
number of steps and leaves room for that.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gruppo.record import Database

VARIANTS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "group 8": ("rollout.group_size=8", "rollout.prompts_per_step=4"),
    "group 2": ("rollout.group_size=2", "rollout.prompts_per_step=16"),
    "short": ("rollout.max_tokens=16",),
    "very short": ("rollout.max_tokens=8",),
    "long": ("rollout.max_tokens=64",),
    "cool": ("rollout.temperature=0.5",),
    "hot": ("rollout.temperature=1.5",),
    "with a reference": ("objective.kl={beta = 0.05}",),
    "two updates": ("train.minibatches=2", "train.inner_epochs=2"),
}
MEMORY, TIME = 0.15, 0.30


def main() -> int:
    """Run the variants and print a Markdown table."""
    asked = _arguments()
    names = asked.only or list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        sys.exit(f"no variant {unknown[0]!r}: there are {', '.join(VARIANTS)}")
    rows = []
    print("| variant | dead: preflight | run | cut: preflight | run | GiB | run | s a step | run |")
    print("|---" * 9 + "|")
    for name in names:
        rows.append(_compare(name, asked))
        print(_line(rows[-1]), flush=True)
    held = {key: sum(row["holds"][key] for row in rows) for key in rows[0]["holds"]}
    print("\n" + ", ".join(f"{key}: {count} of {len(rows)}" for key, count in held.items()))
    if asked.output is not None:
        asked.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--groups", type=int, default=48)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _compare(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    seed = f"train.seed={100 + list(VARIANTS).index(name)}"
    settings = [*VARIANTS[name], f"train.steps={asked.steps}", seed, *asked.set]
    with tempfile.TemporaryDirectory() as folder:
        found = _preflight(asked.recipe, settings, asked.groups, Path(folder))
        measured = _train(asked.recipe, settings, asked.steps, Path(folder))
    own = found["size"]
    dead = next((s["dead"]["share"] for s in found["sizes"] if s["dead"]["group"] == own), None)
    peak = found["memory"]["peak"] / 2**30 if found["memory"] else float("nan")
    step = found["seconds"]["step"]
    return {
        "variant": name,
        "dead": dead,
        "cut": found["truncation"],
        "gib": peak,
        "step": step,
        "measured": measured,
        "holds": {
            "dead groups": dead is not None and dead["low"] <= measured["dead"] <= dead["high"],
            "cut": found["truncation"]["low"] <= measured["cut"] <= found["truncation"]["high"],
            "memory": abs(peak / measured["gib"] - 1) <= MEMORY,
            "step time": abs(step / measured["step"] - 1) <= TIME,
        },
    }


def _preflight(recipe: str, settings: list[str], groups: int, folder: Path) -> dict[str, Any]:
    output = folder / "preflight.json"
    command = ["preflight", recipe, "--groups", str(groups), "--json", str(output)]
    _gruppo([*command, *_set(settings)])
    found = json.loads(output.read_text(encoding="utf-8"))
    found["size"] = found["completions"] // found["groups"]
    return found


def _train(recipe: str, settings: list[str], steps: int, folder: Path) -> dict[str, float]:
    still = [
        "optim.lr=0.0",
        "data.held_out=0",
        f"record.save_every={steps}",
    ]
    own = [f"record.folder={folder}", "record.name=run"]
    peak = _gruppo(["train", recipe, *_set([*settings, *still, *own])])
    with Database(folder / "run" / "run.sqlite", read_only=True) as database:
        series = database.metrics()
    mean = {key: statistics.fmean(v for _, v in series[key]) for key in _MEASURED}
    times = [seconds for _, seconds in series["time/step"][1:]]  # the first one warms up
    return {
        "dead": mean["group/zero_std_frac"],
        "cut": mean["trunc/frac"],
        "gib": peak,
        "step": statistics.median(times),
    }


_MEASURED = ("group/zero_std_frac", "trunc/frac")


def _gruppo(arguments: list[str]) -> float:
    """Run the command line in a process of its own; return the peak of its memory in GiB."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gruppo", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None, "piped"
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"gruppo {' '.join(arguments)}: exit code {code}\n{told[-2000:]}")
    return usage.ru_maxrss / 2**20


def _set(settings: list[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def _line(row: dict[str, Any]) -> str:
    measured, holds = row["measured"], row["holds"]

    def marked(text: str, key: str) -> str:
        return text if holds[key] else f"**{text}**"

    dead, cut = (
        "?" if i is None else f"{i['low']:.2f} to {i['high']:.2f}"
        for i in (row["dead"], row["cut"])
    )
    cells = [
        row["variant"],
        dead,
        marked(f"{measured['dead']:.2f}", "dead groups"),
        cut,
        marked(f"{measured['cut']:.2f}", "cut"),
        f"{row['gib']:.2f}",
        marked(f"{measured['gib']:.2f}", "memory"),
        f"{row['step']:.2f}",
        marked(f"{measured['step']:.2f}", "step time"),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
