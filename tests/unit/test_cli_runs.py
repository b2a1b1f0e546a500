"""Whole runs of a tiny random model through the command line, in this process."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gruppo.cli import main
from gruppo.cli.progress import Reporter
from gruppo.evaluate import Evaluation, Evaluator
from gruppo.interrupt import Interrupted
from gruppo.policy import checkpoint
from gruppo.record import Database
from gruppo.train import Outcome
from support.commands import arguments


def metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    with Database(run / "run.sqlite", read_only=True) as database:
        series = database.metrics()
    return {name: points for name, points in series.items() if not name.startswith("time/")}


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps, with checkpoints of steps 2 and 4."""
    torch.set_num_threads(1)  # as in the tests: sums are equal only for one number of threads
    folder = tmp_path_factory.mktemp("runs")
    command = ["train", "quickstart", *arguments(tiny_folder, "whole")]
    assert main([*command, "--set", f"record.folder={folder}"]) == 0
    return folder / "whole"


def test_a_run_is_kept_whole(finished: Path):
    assert checkpoint.steps(finished / "checkpoints") == [2, 4]
    assert [step for step, _ in metrics(finished)["reward/total_mean"]] == [1, 2, 3, 4]
    weights = load_file(finished / "checkpoints" / "00000004" / "model" / "model.safetensors")
    before = load_file(finished / "checkpoints" / "00000002" / "model" / "model.safetensors")
    assert any(not torch.equal(weights[name], before[name]) for name in weights)  # it learned


def test_the_end_says_before_and_after_and_what_next(tiny_folder, tmp_path, capsys):
    folder = f"record.folder={tmp_path}"
    short = arguments(tiny_folder, "x", **{"train.steps": "1"})
    assert main(["train", "quickstart", *short, "--set", folder]) == 0
    shown = capsys.readouterr().out
    assert "step 1/1  reward" in shown
    assert "3 held-out problems" in shown
    assert shown.count("before (reward") == shown.count("after (reward") == 2
    assert f"gruppo chat {tmp_path / 'x'}" in shown


def test_the_weights_of_the_best_evaluation_are_kept_and_named(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    evaluated, made = Evaluator.__call__, iter(range(9))

    def falling(self: Evaluator) -> Evaluation:
        """Right after step 1, and never again."""
        found = evaluated(self)
        return replace(found, metrics={**found.metrics, "pass@1": float(next(made) == 1)})

    monkeypatch.setattr(Evaluator, "__call__", falling)
    changes = {"eval.every": "1", "train.steps": "4", "record.keep_last": "1"}
    command = ["train", "quickstart", *arguments(tiny_folder, "run", **changes)]
    assert main([*command, "--set", f"record.folder={tmp_path}"]) == 0
    run = tmp_path / "run"
    assert checkpoint.steps(run / "checkpoints") == [1, 4]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " best " in line]
    words, _, why = line.partition("#")
    assert words.split() == ["gruppo", "export", "weights", str(run), "best", "--step", "1"]
    assert why.strip() == "the best evaluation, 1.000"
    assert main(["export", "weights", str(run), str(tmp_path / "best"), "--step", "1"]) == 0
    kept = run / "checkpoints" / "00000001" / "model" / "model.safetensors"
    exported = load_file(tmp_path / "best" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in load_file(kept).items())


def test_resume_equals_the_unbroken_run_to_the_last_bit(finished, tiny_folder, tmp_path, capsys):
    command = ["train", "quickstart", *arguments(tiny_folder, "cut")]
    assert main([*command, "--set", f"record.folder={tmp_path}"]) == 0
    cut = tmp_path / "cut"
    for file in sorted((cut / "checkpoints" / "00000004").rglob("*")):
        if file.is_file():
            file.write_bytes(b"damaged")  # so that step 2 is the newest intact one
    capsys.readouterr()
    assert main(["resume", str(cut)]) == 0
    shown = capsys.readouterr().out
    assert "damaged, passed over" in shown
    assert "going on after step 2 of 4" in shown
    same = metrics(finished)
    for name, points in metrics(cut).items():
        assert str(points) == str(same[name]), name  # as text, because NaN differs from itself
    for part in ("model/model.safetensors", "state.safetensors"):
        ours = load_file(cut / "checkpoints" / "00000004" / part)
        theirs = load_file(finished / "checkpoints" / "00000004" / part)
        assert {name: torch.equal(ours[name], theirs[name]) for name in theirs} == dict.fromkeys(
            ours, True
        )


def test_a_run_folder_in_use_is_refused_and_left_alone(finished, tiny_folder, capsys):
    before = sorted(finished.rglob("*"))
    command = ["train", "quickstart", *arguments(tiny_folder, "whole")]
    assert main([*command, "--set", f"record.folder={finished.parent}"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert sorted(finished.rglob("*")) == before


def test_a_model_that_is_not_there_leaves_no_run_folder(tmp_path, capsys):
    command = ["train", "quickstart", *arguments(tmp_path / "nowhere", "x")]
    assert main([*command, "--set", f"record.folder={tmp_path / 'runs'}"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_eval_of_a_run_gives_pass_at_k(finished, capsys):
    command = ["eval", str(finished), "--step", "2", "--set", "eval.samples=2"]
    assert main([*command, "--set", "eval.k=[1, 2]"]) == 0
    shown = capsys.readouterr()
    assert "3 problems" in shown.out
    assert "sampled/pass@2" in shown.out
    assert "after step 2" in shown.err


def test_export_gives_a_model_folder_and_samples(finished, tmp_path, capsys):
    assert main(["export", "weights", str(finished), str(tmp_path / "model")]) == 0
    exported = load_file(tmp_path / "model" / "model.safetensors")
    kept = load_file(finished / "checkpoints" / "00000004" / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], kept[name]) for name in kept)
    assert main(["export", "weights", str(finished), str(tmp_path / "model")]) == 2
    assert main(["export", "samples", str(finished), str(tmp_path / "s.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    capsys.readouterr()
    assert main(["export", "weights", str(finished), str(tmp_path / "y"), "--step", "3"]) == 2
    assert "checkpoints of steps [2, 4]" in capsys.readouterr().err


def test_chat_answers_once_and_the_same_each_time(finished, capsys):
    command = ["chat", str(finished), "--prompt", "hello", "--set", "rollout.max_tokens=9"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert len(first) > 1


def test_replay_shows_a_step_and_records_nothing(finished, capsys):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    assert main(["resume", str(finished), "--replay", "3"]) == 0
    (shown,) = [
        line.split()[1]
        for line in capsys.readouterr().err.splitlines()
        if line.split()[:1] == ["reward/total_mean"]
    ]
    assert float(shown) == pytest.approx(dict(metrics(finished)["reward/total_mean"])[3], abs=1e-5)
    after = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    assert {f: t for f, t in after.items() if not f.name.startswith("run.sqlite")} == {
        f: t for f, t in before.items() if not f.name.startswith("run.sqlite")
    }


def test_replay_does_not_mind_the_time_limit(finished, tmp_path, capsys):
    cut = tmp_path / "run"
    shutil.copytree(finished, cut)
    text = (cut / "recipe.toml").read_text()
    assert "time_limit_s = 0.0" in text
    (cut / "recipe.toml").write_text(text.replace("time_limit_s = 0.0", "time_limit_s = 0.001"))
    assert main(["resume", str(cut), "--replay", "3"]) == 0
    assert "\nstep 3\n" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "first"), [("2", 3), ("3", 1)])
def test_steps_run_again_are_equal_to_the_last_bit(finished, capsys, count, first):
    """From the checkpoint of step 2, or from the start where none is old enough."""

    def written() -> dict[Path, int]:
        # readers of a database touch what they share its lock in
        files = (f for f in finished.rglob("*") if f.is_file() and not f.name.endswith("-shm"))
        return {file: file.stat().st_mtime_ns for file in files}

    before = written()
    assert main(["resume", str(finished), "--verify", count]) == 0
    shown = capsys.readouterr().err
    assert f"verifying steps {first} to 4" in shown
    found = re.search(r"equal to the last bit: (\d+) metrics", shown)
    per_step = len(metrics(finished)) - 2  # the task reward's and others are in every step
    assert int(found[1]) >= (5 - first) * per_step // 2
    assert written() == before


def test_the_first_difference_of_steps_run_again_is_named(finished, tmp_path, capsys):
    changed = shutil.copytree(finished, tmp_path / "run")
    text = (changed / "recipe.toml").read_text()
    (changed / "recipe.toml").write_text(text.replace("lr = 0.001", "lr = 0.0011"))
    assert main(["resume", str(changed), "--verify", "2"]) == 1
    shown = capsys.readouterr().err
    assert re.search(r"step 3: optim/lr was \S+ and is \S+", shown)
    assert re.search(r"tensors: \d+ differ from checkpoint 4, the first is model\.", shown)
    assert "equal to the last bit" not in shown


@pytest.mark.parametrize("command", [["--verify", "2"], ["--replay", "3"]])
def test_steps_are_not_run_again_from_a_damaged_checkpoint(finished, tmp_path, capsys, command):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "checkpoints" / "00000002" / "state.safetensors").write_bytes(b"damaged")
    assert main(["resume", str(run), *command]) == 3
    assert "00000002" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "5"])
def test_steps_that_the_run_has_not_are_not_verified(finished, capsys, count):
    assert main(["resume", str(finished), "--verify", count]) == 2
    assert f"--verify {count}: {finished} has 4 steps" in capsys.readouterr().err


@pytest.mark.parametrize("step", [0, 5])
def test_a_step_that_the_run_has_not_is_not_replayed(finished, capsys, step):
    assert main(["resume", str(finished), "--replay", str(step)]) == 2
    assert f"--replay {step}: {finished} has steps 1 to 4" in capsys.readouterr().err


def test_a_replay_that_ends_early_says_so(finished, monkeypatch, capsys):
    def cut_short(run, state):
        return Outcome(state=state, ended_by="time", before=None, after=None)

    monkeypatch.setattr("gruppo.cli.replay.train", cut_short)
    assert main(["resume", str(finished), "--replay", "3"]) == 5
    assert "step 3 was not reached: it ended after 2 (time)" in capsys.readouterr().err


def test_an_interrupt_saves_the_last_finished_step(tiny_folder, tmp_path, monkeypatch):
    shown = Reporter.__call__

    def interrupt(self: Reporter, step: int, *rest: Any) -> None:
        if step == 3:  # before the step is closed
            raise Interrupted(signal.SIGTERM)
        shown(self, step, *rest)

    monkeypatch.setattr(Reporter, "__call__", interrupt)
    command = ["train", "quickstart", *arguments(tiny_folder, "cut", **{"record.save_every": "9"})]
    assert main([*command, "--set", f"record.folder={tmp_path}"]) == 143
    assert checkpoint.steps(tmp_path / "cut" / "checkpoints") == [2]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_process_in_order(tiny_folder, tmp_path, number, code):
    command = [sys.executable, "-m", "gruppo", "train", "quickstart"]
    command += arguments(tiny_folder, "cut", **{"train.steps": "100000"})
    command += ["--set", f"record.folder={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.split("/")[0].split() == ["step", "3"])
        process.send_signal(number)
        sent = time.monotonic()
        assert process.wait(timeout=30) == code
        assert time.monotonic() - sent < 10
    assert checkpoint.steps(tmp_path / "cut" / "checkpoints")[-1] >= 3
