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

from gruppo.bench.machine import watching
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
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Seconds of both systems' phases, medians over ``rounds``, and their ratios.

    Args:
        work: what both do; ``compute`` must be given, and prompts must be text.
        trl: TRL's side.
        rounds: how often each runs; they take turns.
        report: is told of every run.

    Raises:
        ValueError: the work cannot be given to TRL.
        OSError: a run failed; its last words are in the message.
    """
    if work.prompt_tokens or work.compute == "auto":
        raise ValueError("--vs trl needs text prompts (no --prompt-tokens) and a --compute")
    if (work.prompts * work.group) % trl.micro_batch:
        raise ValueError(f"micro_batch = {trl.micro_batch} does not divide prompts x group")
    questions = work.questions((work.steps + work.warmup) * work.prompts)
    task = {**asdict(work), "device": device_of(work), "questions": questions}
    task |= {"model": load(work.model).folder, "trl_micro_batch": trl.micro_batch}
    task["trl_weights"] = work.compute if trl.weights == "compute" else trl.weights
    script = str(files("gruppo.bench").joinpath("trl_child.py"))
    commands = {"trl": [trl.python, script], "gruppo": [sys.executable, "-m", _OURS]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            with watching() as others:
                outcome = _run(command, task)
            # the child's own time is not ours: what is left over is that of third processes
            outcome["round"] = number
            outcome["busy_cpus"] = others.share
            found[name].append(outcome)
            report(f"round {number + 1}, {name}: {outcome['seconds']['step']:.1f} s a step")
    return {"runs": found, **_compare(found)}


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
