"""Runs that are cut off anywhere and taken up again equal the unbroken run to the last bit."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gruppo.cli import main
from gruppo.policy import checkpoint
from gruppo.record import Database
from support.commands import cut_after

SETTINGS = {
    "train.steps": "6",
    "train.tokens_per_microbatch": "300",
    "rollout.prompts_per_step": "2",
    "rollout.group_size": "4",
    "rollout.max_tokens": "6",
    "data.held_out": "3",
    "data.train.0.size": "60",
    "optim.lr": "1e-3",
    # not what a machine finds faster: the unbroken run and the cut one must compute alike
    "model.compute": "float32",
    "model.products": "torch",
    "eval.every": "2",
    "record.save_every": "1",
    "record.keep_last": "99",
    # random text differs in it, so there is a gradient
    "reward.parts.answer": '{name = "answer", kind = "regex", pattern = "[a-m]"}',
}

VARIANTS = {
    "plain": {},
    "several_updates": {
        "train.minibatches": "2",
        "train.inner_epochs": "2",
        "train.reference_sync_steps": "2",
        "train.reference_mixup": "0.5",
        "objective.kl": "{beta = 0.1, adaptive = {kind = 'adaptive_kl', target = 0.01}}",
        "objective.entropy": "{coef = 0.01, adaptive = {kind = 'adaptive_entropy', target = 9.0}}",
    },
    "buffered": {
        "rollout.filter": "resample",
        "rollout.oversample": "2.0",
        "rollout.group_size": "2",
        "train.minibatches": "2",
    },
    "adapter": {
        # dropout draws from torch's generator; the reference is the model without the adapter
        "model.lora": "{rank = 2, dropout = 0.1}",
        "objective.kl": "{beta = 0.1}",
        "train.minibatches": "2",
    },
    "episodes": {
        # a turn ends at some letters, and the game answers it: about once a completion
        "environment.use": "guessing_game",
        "environment.max_turns": "3",
        "rollout.max_tokens": "120",
        "rollout.group_size": "2",
        "rollout.stop": str(list("nopqrstuvwxyz")),
        "train.tokens_per_microbatch": "900",
        "eval.samples": "0",
    },
}


FAST = {("plain", 0), ("episodes", 1), ("several_updates", 3), ("buffered", 2), ("adapter", 3)}
"""Cuts that are tried in every test run; the others are slow only because they are many."""


def arguments(model: Path, runs: Path, **changes: str) -> list[str]:
    settings = SETTINGS | {"model.name": str(model), "record.folder": str(runs)}
    settings |= {"record.name": "run"} | changes
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["train", "quickstart", *given]


def recorded(run: Path) -> dict[str, object]:
    """Every metric but times, every evaluation and completion (NaN as text: NaN equals nothing)."""
    with Database(run / "run.sqlite", read_only=True) as database:
        found: dict[str, object] = {
            name: str(points)
            for name, points in database.metrics().items()
            if not name.startswith("time/")
        }
        found["evaluations"] = str(database.evaluations())
        for row in database.iterate():  # one by one, so that a difference is shown as it is
            found[f"step {row.step}, group {row.group}, row {row.row}"] = str(row)
    return found


def digest(run: Path) -> dict[str, str]:
    """SHA-256 of the final checkpoint's files (state.json too: controllers, stream, history)."""
    folder = run / "checkpoints" / f"{checkpoint.steps(run / 'checkpoints')[-1]:08d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    return {entry["name"]: entry["sha256"] for entry in manifest["files"]}


def assert_equal(run: Path, unbroken: Path) -> None:
    ours, theirs = recorded(run), recorded(unbroken)
    differing = [name for name in theirs if ours.get(name) != theirs[name]]
    assert [(name, ours.get(name), theirs[name]) for name in differing] == []
    assert ours.keys() == theirs.keys()
    assert digest(run) == digest(unbroken)


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The unbroken run of each variant, with a checkpoint after every step."""
    torch.set_num_threads(1)
    found = {}
    for name, changes in VARIANTS.items():
        folder = tmp_path_factory.mktemp(name)
        assert main(arguments(tiny_folder, folder, **changes)) == 0
        found[name] = folder / "run"
    return found


CUTS = [
    pytest.param(
        variant,
        step,
        marks=() if (variant, step) in FAST else pytest.mark.slow,
        id=f"{variant}-{step}",
    )
    for variant in VARIANTS
    for step in range(7)
]


@pytest.mark.parametrize(("variant", "step"), CUTS)
def test_resumed_after_any_step_it_is_the_same_run(whole, tmp_path, variant, step):
    cut = cut_after(whole[variant], step, tmp_path / "run")
    assert main(["resume", str(cut)]) == 0
    assert_equal(cut, whole[variant])


def test_the_variants_do_what_they_are_for(whole):
    """Without this the tests above could pass because nothing happened."""
    series = {name: recorded(run) for name, run in whole.items()}
    with Database(whole["several_updates"] / "run.sqlite", read_only=True) as database:
        metrics = database.metrics()
    assert [step for step, _ in metrics["ref/updates"]] == [2, 4, 6]
    assert len({value for _, value in metrics["kl/beta"]}) == 6
    assert metrics["entropy/coef"][0][1] == 0.0
    assert metrics["entropy/coef"][1][1] == pytest.approx(0.015)
    assert metrics["kl/ref_k3"][-1][1] > 0
    states = [
        json.loads((folder / "state.json").read_text())["train"]["rollouts"]["surplus"]
        for folder in sorted((whole["buffered"] / "checkpoints").iterdir())
    ]
    assert any(states)
    assert "ref/updates" not in series["plain"]
    with Database(whole["adapter"] / "run.sqlite", read_only=True) as database:
        assert database.metrics()["kl/ref_k3"][-1][1] > 0
    with Database(whole["episodes"] / "run.sqlite", read_only=True) as database:
        turns = [value for _, value in database.metrics()["env/turns"]]
        dialogues = [row.interaction for row in database.iterate()]
    assert max(turns) > 1
    heard = {m.content for d in dialogues for m in d.messages if m.role == "user"}
    assert "Guess a whole number." in heard
    model = whole["adapter"] / "checkpoints" / "00000006" / "model"
    assert not (model / "model.safetensors").exists()


@pytest.mark.slow
def test_the_same_run_twice_is_the_same(whole, tiny_folder, tmp_path):
    changes = VARIANTS["several_updates"]
    assert main(arguments(tiny_folder, tmp_path, **changes)) == 0
    assert_equal(tmp_path / "run", whole["several_updates"])


REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return min(1.0, sum(letter in "abcdefghijklm" for letter in solution_str) / 10)
"""


@pytest.mark.slow
def test_the_number_of_reward_workers_changes_nothing(tiny_folder, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    for workers in (1, 2):
        part = (
            f'{{name = "answer", kind = "function", function = "{tmp_path}/mine.py", '
            f"workers = {workers}}}"
        )
        changes = {"reward.parts.answer": part}
        assert main(arguments(tiny_folder, tmp_path / str(workers), **changes)) == 0
    assert_equal(tmp_path / "1" / "run", tmp_path / "2" / "run")


# Processes ------------------------------------------------------------------------------------


def start(command: list[str]) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "gruppo", *command]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert any(line in text for text in process.stdout), "ended before it got so far"


def finish(runs: Path, model: Path, changes: dict[str, str]) -> None:
    """Take the run up again, or start it if it left nothing to take up."""
    again = ["resume", str(runs / "run")]
    if not (runs / "run" / "run.json").exists():
        shutil.rmtree(runs, ignore_errors=True)
        again = arguments(model, runs, **changes)
    done = subprocess.run(
        [sys.executable, "-m", "gruppo", *again], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def unbroken(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The unbroken runs as processes, because sums depend on a process's number of threads."""
    found = {}
    for name, changes in VARIANTS.items():
        folder = tmp_path_factory.mktemp(name)
        process = start(arguments(tiny_folder, folder, **changes, **LONGER))
        wait_for(process, "run: ")
        began = time.monotonic()
        process.communicate()
        assert process.returncode == 0
        found[name] = folder / "run"
        SECONDS[name] = time.monotonic() - began
    return found


LONGER = {"train.steps": "16", "record.save_every": "3", "eval.every": "4"}
SECONDS: dict[str, float] = {}
KILLS = {"plain": 10, "several_updates": 4, "buffered": 4, "adapter": 4, "episodes": 4}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_moments_and_resumed(unbroken, tiny_folder, tmp_path, variant):
    moments = random.Random(f"kill {variant}")
    for number in range(KILLS[variant]):
        runs = tmp_path / str(number)
        process = start(arguments(tiny_folder, runs, **VARIANTS[variant], **LONGER))
        wait_for(process, "run: ")
        time.sleep(moments.random() * SECONDS[variant])
        process.kill()
        process.communicate()
        finish(runs, tiny_folder, VARIANTS[variant] | LONGER)
        assert_equal(runs / "run", unbroken[variant])
        shutil.rmtree(runs)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signalled_at_random_moments_and_resumed(unbroken, tiny_folder, tmp_path, number, code):
    moments = random.Random(int(number))
    variant = "several_updates"
    for index in range(5):
        runs = tmp_path / str(index)
        process = start(arguments(tiny_folder, runs, **VARIANTS[variant], **LONGER))
        wait_for(process, "step  1/" if index else "run: ")
        time.sleep(moments.random() * 0.8 * SECONDS[variant])
        process.send_signal(number)
        sent = time.monotonic()
        said, _ = process.communicate(timeout=30)
        assert "Traceback" not in said
        if "all steps done" in said:  # it was through already, and saved
            assert process.returncode in (0, code), said
        else:
            assert process.returncode == code, said
            assert time.monotonic() - sent < 10
            with Database(runs / "run" / "run.sqlite", read_only=True) as database:
                last = database.last_step()
            assert checkpoint.steps(runs / "run" / "checkpoints")[-1] == last
            assert list((runs / "run" / "checkpoints").glob(".*")) == []
        finish(runs, tiny_folder, VARIANTS[variant] | LONGER)
        assert_equal(runs / "run", unbroken[variant])
