"""Sends signals to runs at chosen moments; run by test_signals.py.

``python signals_child.py <model> <folder> <moments>``. Everything heavy is imported once, and each
run is a fork of this process (pytest's must not fork). Prints one JSON line a run.
"""

import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import gruppo.cli.training
from gruppo.cli import main
from gruppo.policy import checkpoint
from gruppo.record import Database
from support.commands import arguments

MARK = "GRUPPO_TEST_RUN"
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return min(1.0, sum(letter in "abcdefghijklm" for letter in solution_str) / 10)
"""
TURN = 0.05  # seconds; an undisturbed one takes a hundredth
CHANGES = {
    "train.steps": "24",
    "train.minibatches": "2",
    "record.save_every": "2",
    "record.keep_last": "2",
    "eval.every": "4",
    "reward.answer_template": "none",
}


def start(model: Path, folder: Path, number: int) -> int:
    """Fork a run whose reward is a function in two workers; they inherit the mark."""
    child = os.fork()
    if child:
        return child
    log = os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ[MARK] = f"{os.getpid()}"
    part = f'{{name = "answer", kind = "function", function = "{folder}/mine.py", workers = 2}}'
    changes = CHANGES | {"reward.parts.answer": part, "record.folder": str(folder)}
    sys.argv = ["gruppo", "train", "quickstart", *arguments(model, f"run{number}", **changes)]
    code = 70
    try:
        code = main()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """Exit code of ``child``, or None if it is still there after ``seconds``."""
    return ended_in(child, seconds)[0]


def ended_in(child: int, seconds: float, most: float = math.inf) -> tuple[int | None, float]:
    """The same, and the seconds it took, of which one turn of this loop counts ``most`` at most.

    Where other programs take the processor away from everyone, they take it from this loop too: a
    turn is then far longer than its hundredth of a second, and says nothing of the run.
    """
    waited, before = 0.0, time.monotonic()
    while waited < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), waited
        time.sleep(0.01)
        now = time.monotonic()
        waited, before = waited + min(now - before, most), now
    return None, waited


def left_of(child: int) -> list[int]:
    """Processes that carry the run's mark and are no zombies, a second after its end at most."""
    for _ in range(20):
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if f"{MARK}={child}\0".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except (OSError, ValueError):
                continue
        if not found:
            return []
        time.sleep(0.05)
    return found


def recorded(run: Path) -> tuple[int, int, list[str]]:
    """Last recorded step, step of the newest checkpoint, and files that do not belong there."""
    if not (run / "run.sqlite").exists():
        return 0, 0, []
    with Database(run / "run.sqlite", read_only=True) as database:
        last = database.last_step()
    steps = checkpoint.steps(run / "checkpoints")
    return last, steps[-1] if steps else 0, [str(p) for p in (run / "checkpoints").glob(".*")]


def try_moment(model: Path, folder: Path, number: int, wait: float, signum: int) -> None:
    """One run, a signal after ``wait`` seconds, and what came of it."""
    child = start(model, folder, number)
    code, sent = ended(child, wait), 0.0
    if code is None:
        os.kill(child, signum)
        code, sent = ended_in(child, 30, TURN)
    last, saved, strange = recorded(folder / f"run{number}")
    line = {"signal": signum, "wait": wait, "code": code, "seconds": sent, "last": last}
    line |= {"saved": saved, "strange": strange, "left": left_of(child)}
    line["log"] = (folder / f"{number}.log").read_text(errors="replace")
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert gruppo.cli.training.train, "imported so that every fork has it"
    model, folder, moments = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    (folder / "mine.py").write_text(REWARD)
    began = time.monotonic()
    assert ended(start(model, folder, 0), 120) == 0, (folder / "0.log").read_text()
    whole = time.monotonic() - began
    draw = random.Random(6)
    for number in range(1, moments + 1):
        signum = signal.SIGINT if number % 2 else signal.SIGTERM
        wait = whole * (number - 1 + draw.random()) / moments  # one in each slice of the run
        try_moment(model, folder, number, wait, signum)
