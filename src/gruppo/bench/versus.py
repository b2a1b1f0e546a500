"""TRL and gruppo on the same work, alternately, each in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from gruppo.bench.machine import QUIET, watching
from gruppo.bench.work import Work, device_of
from gruppo.model import load

_OURS = "gruppo.bench.child"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trl:
    """How TRL does its side.

    Attributes:
        python: interpreter of an environment with TRL (gruppo need not be in it).
        micro_batch: completions in one of its forward passes.
        weights: their type: that of the products, or float32 under autocast (its own default).
    """

    python: str
    micro_batch: int = 8
    weights: Literal["compute", "float32"] = "compute"


def versus_trl(
    work: Work,
    *,
    trl: Trl,
    rounds: int,
    gflops: dict[str, float] | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Seconds of both systems' phases, medians over ``rounds``, and their ratios.

    Runs in which other processes used more than ``QUIET`` CPUs count nothing, where each system has
    another.

    Args:
        work: what both do; ``compute`` must be given, and prompts must be text.
        trl: TRL's side.
        rounds: how often each runs; they take turns.
        gflops: the machine's peak by type of the products.
        report: is told of every run, and of those that do not count.

    Raises:
        ValueError: the work cannot be given to TRL.
        OSError: a run failed; its last words are in the message.
    """
    if work.prompt_tokens or work.compute == "auto":
        raise ValueError("--vs trl needs text prompts (no --prompt-tokens) and a --compute")
    if work.lora_rank:
        raise ValueError(f"--lora-rank {work.lora_rank} cannot be given to TRL: leave out --vs trl")
    if (work.prompts * work.group) % trl.micro_batch:
        raise ValueError(f"micro_batch = {trl.micro_batch} does not divide prompts x group")
    questions = work.questions((work.steps + work.warmup) * work.prompts)
    task: dict[str, Any] = {**asdict(work), "device": device_of(work), "questions": questions}
    task |= {"model": load(work.model).folder, "trl_micro_batch": trl.micro_batch, "gflops": gflops}
    task["trl_weights"] = work.compute if trl.weights == "compute" else trl.weights
    script = str(files("gruppo.bench").joinpath("trl_child.py"))
    commands = {"trl": [trl.python, script], "gruppo": [sys.executable, "-m", _OURS]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            with watching() as others:
                outcome = _run(command, task)
            outcome["round"] = number
            outcome["busy_cpus"] = others.share  # not those of the run itself
            found[name].append(outcome)
            report(f"round {number + 1}, {name}: {outcome['seconds']['step']:.1f} s a step")
    quiet, dropped, said = _undisturbed(found)
    if said:
        report(said)
    return {"runs": found, "dropped": dropped, **_compare(quiet)}


def _run(command: list[str], task: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "work.json", Path(folder) / "outcome.json"
        asked.write_text(json.dumps(task), encoding="utf-8")
        ran = subprocess.run(
            [*command, str(asked), str(told)], capture_output=True, text=True, check=False
        )
        if ran.returncode:
            raise OSError(f"{' '.join(command)} failed:\n{ran.stderr[-2000:]}")
        return json.loads(told.read_text(encoding="utf-8"))


def _undisturbed(
    found: dict[str, list[dict[str, Any]]],
) -> tuple[dict[str, list[dict[str, Any]]], list[str], str]:
    """The runs that count, the names of the others, and what is to be said of these."""
    quiet = {n: [run for run in runs if run["busy_cpus"] <= QUIET] for n, runs in found.items()}
    loud = [
        f"{name} in round {run['round'] + 1}"
        for name, runs in found.items()
        for run in runs
        if run["busy_cpus"] > QUIET
    ]
    if not loud:
        return quiet, [], ""
    disturbed = f"other processes used more than {QUIET} CPUs during {', '.join(loud)}"
    alone = [name for name, runs in quiet.items() if not runs]
    if alone:
        return found, [], f"{disturbed}: no other run of {' and '.join(alone)}, so all count"
    return quiet, loud, f"{disturbed}: not counted"


def _compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    seconds = {name: _medians(runs) for name, runs in found.items()}
    memory = {name: max(run["peak_gib"] for run in runs) for name, runs in found.items()}
    phases = ("sampling", "reference", "training", "step")
    both = [p for p in phases if all(seconds[name].get(p) for name in seconds)]
    return {
        "seconds": seconds,
        "peak_gib": memory,
        "times_faster": {p: seconds["trl"][p] / seconds["gruppo"][p] for p in both},
        "memory_ratio": memory["gruppo"] / memory["trl"],
    }


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    names = runs[0]["seconds"]
    middle = {n: statistics.median(run["seconds"].get(n, 0.0) for run in runs) for n in names}
    middle["training"] = middle["step"] - middle["sampling"] - middle.get("reference", 0.0)
    return middle
