"""Starting and resuming runs: what is written when, what is recorded, what the disk must hold."""

import dataclasses
import json
import shutil
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from gruppo.cli import main
from gruppo.interrupt import Interrupted
from gruppo.policy import checkpoint
from gruppo.recipe import load
from gruppo.recipe.build import pin
from gruppo.recipe.keeper import bytes_needed, read_evaluation
from gruppo.recipe.session import computing, read_recipe, resume, start
from gruppo.record import Database, RunDirectory, Tracker, Wandb
from gruppo.train import train
from support.commands import arguments, cut_after

Usage = namedtuple("Usage", "total used free")
WITH_TRACKER = {"record.trackers": "[{kind = 'wandb'}]"}


def replaced(run, **settings):
    return dataclasses.replace(run, settings=dataclasses.replace(run.settings, **settings))


def recipe(model: Path, **changes: str):
    return load("quickstart", arguments(model, "run", **changes)[1::2])


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on a machine whose "auto" is bfloat16."""
    path = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gruppo.recipe.build.compute_dtype", lambda device: torch.bfloat16)
        with start(recipe(tiny_folder), path, silent) as session:
            train(session.run, session.state)
    return path


# Nothing is written too early ---------------------------------------------------------------


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data.train.0.size": "2"}, "held_out"),
        ({"model.device": "cuda:99"}, r"no such device here.*\(cpu, cuda, mps or xpu\)"),
        ({"record.trackers": "[{kind = 'wandb'}]"}, r"gruppo\[wandb\]"),
    ],
)
def test_a_start_that_fails_writes_nothing(
    tiny_folder, tmp_path, monkeypatch, change, reason, exists
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    with (
        pytest.raises((ValueError, ImportError), match=reason),
        start(recipe(tiny_folder, **change), path, silent),
    ):
        pass
    assert [entry.name for entry in tmp_path.rglob("*")] == ["run"] * exists


def test_a_taken_name_is_refused_before_a_model_is_opened(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").touch()
    with (
        pytest.raises(ValueError, match="it holds notes"),
        start(recipe(tmp_path / "nowhere"), tmp_path / "run", silent),
    ):
        pass
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["notes"]


# Device and number format ---------------------------------------------------------------------


def test_what_auto_came_to_is_recorded(finished):
    with RunDirectory.open(finished, lock=False) as directory:
        kept = read_recipe(directory)
    assert (kept.model.device, kept.model.compute) == ("cpu", "bfloat16")
    meta = json.loads((finished / "run.json").read_text())["meta"]
    asked = {"model.device": "auto", "model.compute": "auto", "model.products": "auto"}
    assert meta == {"asked": asked, "computing": computing()}


def test_what_changed_between_two_processes_is_told(finished, tmp_path):
    cut = cut_after(finished, 2, tmp_path / "run")
    said: list[str] = []
    with resume(cut, said.append):
        pass
    assert not [text for text in said if "by rounding" in text]
    info = json.loads((cut / "run.json").read_text())
    info["meta"]["computing"] |= {"threads": 99, "kernels": "of another day"}
    (cut / "run.json").write_text(json.dumps(info))
    with resume(cut, said.append):
        pass
    told = [text for text in said if "by rounding" in text]
    assert [text.split(" where ")[1].split(": ")[0] for text in told] == [
        "the run had 99",
        "the run had 'of another day'",
    ]
    assert told[0].startswith("resumed with threads 1 ")


def test_a_recipe_that_leaves_nothing_open_is_recorded_as_it_is(tiny_folder, tmp_path):
    pinned = {"model.device": "cpu", "model.compute": "float32", "model.products": "torch"}
    given = recipe(tiny_folder, **pinned)
    with start(given, tmp_path / "run", silent) as session:
        assert read_recipe(session.directory) == given
    assert json.loads((tmp_path / "run" / "run.json").read_text())["meta"] == {
        "computing": computing()
    }


def test_later_processes_compute_as_the_first_did(finished, tmp_path, monkeypatch, capsys):
    """Here "auto" comes out otherwise; resume, replay, eval and export do not ask again."""
    monkeypatch.setattr("gruppo.recipe.build.compute_dtype", lambda device: torch.float32)
    cut = cut_after(finished, 2, tmp_path / "run")
    with resume(cut, silent) as session:
        assert session.run.policy.compute_dtype == torch.bfloat16
        train(session.run, session.state)
    names = ("model/model.safetensors", "state.safetensors")
    for name in names:
        ours = (cut / "checkpoints" / "00000004" / name).read_bytes()
        assert ours == (finished / "checkpoints" / "00000004" / name).read_bytes()
    for command in (
        ["resume", str(cut), "--replay", "3"],
        ["eval", str(cut)],
        ["export", "weights", str(cut), str(tmp_path / "out")],
        ["chat", str(cut), "--prompt", "a"],
    ):
        assert main(command) == 0
        assert "on cpu, products in bfloat16" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_told_with_the_ways_out(finished, tmp_path, capsys):
    cut = cut_after(finished, 4, tmp_path / "run")
    text = (cut / "recipe.toml").read_text()
    (cut / "recipe.toml").write_text(text.replace('device = "cpu"', 'device = "cuda:99"'))
    for verb in (["resume"], ["eval"]):
        assert main([*verb, str(cut)]) == 2
        shown = capsys.readouterr().err
        assert 'model.device = "cuda:99"' in shown
        assert "recipe.toml" in shown
    assert main(["eval", str(cut), "--set", "model.device=cpu"]) == 0
    assert main(["export", "weights", str(cut), str(tmp_path / "out")]) == 0
    (cut / "recipe.toml").write_text(text)  # as the message says
    assert main(["resume", str(cut)]) == 0


def test_only_auto_is_resolved(monkeypatch):
    monkeypatch.setattr("gruppo.recipe.build.compute_dtype", lambda device: torch.bfloat16)
    section = load("quickstart").model
    chosen = dataclasses.replace(section, device="cpu", compute="float32", products="torch")
    assert pin(chosen) == chosen
    assert pin(dataclasses.replace(chosen, compute="auto")).compute == "bfloat16"


# Space ------------------------------------------------------------------------------------------


def size_of(run: Path) -> int:
    folder = run / "checkpoints" / "00000004"
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_the_bytes_of_a_checkpoint_are_known_before_the_first(tiny_folder, tmp_path, finished):
    with start(recipe(tiny_folder), tmp_path / "run", silent) as session:
        before = bytes_needed(session.run.policy, adapter=False)
        moved = bytes_needed(session.run.policy, adapter=False, moves_reference=True)
        weights = sum(p.nbytes for p in session.run.policy.model.parameters())
        train(session.run, session.state)
        after = bytes_needed(session.run.policy, adapter=False)
        counters = 4 * len(list(session.run.policy.model.parameters()))
    assert before == 3 * weights  # the model and two moments
    assert (after, moved) == (before + counters, before + weights)
    # what is more: torch's generator and the files' headers
    assert after < size_of(tmp_path / "run") < after + 40_000


def test_an_adapter_s_checkpoint_holds_the_adapter_twice(tiny_folder, tmp_path):
    changes = {"model.lora": "{rank = 2}", "train.steps": "1"}
    with start(recipe(tiny_folder, **changes), tmp_path / "run", silent) as session:
        policy = session.run.policy
        adapter = sum(p.nbytes for p in policy.model.parameters() if p.requires_grad)
        assert bytes_needed(policy, adapter=True) == 4 * adapter


def test_a_disk_too_small_ends_the_start_and_writes_nothing(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    asked = []

    def usage(folder):
        asked.append(Path(folder))
        return Usage(0, 0, 100_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    command = ["train", "quickstart", *arguments(tiny_folder, "run")]
    assert main([*command, "--set", f"record.folder={tmp_path / 'a'}"]) == 3
    shown = capsys.readouterr().err
    assert "100000 are free" in shown
    assert str(tmp_path) in shown
    assert asked == [tmp_path]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_noticed_before_a_save_begins(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    free = iter([10**12])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, next(free, 200_000)))
    command = ["train", "quickstart", *arguments(tiny_folder, "run")]
    assert main([*command, "--set", f"record.folder={tmp_path}"]) == 3
    shown = capsys.readouterr().err
    assert "200000 are free" in shown
    assert str(tmp_path / "run" / "checkpoints") in shown
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


# Trackers and evaluations ---------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 0])
def test_trackers_go_on_after_the_checkpoint(finished, tmp_path, monkeypatch, step):
    cut = cut_after(finished, step, tmp_path / "run")
    text = (cut / "recipe.toml").read_text()
    assert "trackers = []" in text
    with_one = text.replace("trackers = []", 'trackers = [{kind = "wandb"}]')
    (cut / "recipe.toml").write_text(with_one)
    seen = []

    def begin(self, run, *, redone_from=None):
        with Database(run.database, read_only=True) as database:
            seen.append(("start", redone_from, database.last_step()))
        return Tracker(lambda step, metrics: seen.append((step, min(metrics))), lambda: None)

    monkeypatch.setattr("gruppo.recipe.session.client_of", lambda kind: None)
    monkeypatch.setattr(Wandb, "start", begin)
    with resume(cut, silent) as session:
        train(session.run, session.state)
    assert seen[0] == ("start", step + 1 if step else 0, step)
    told = [entry for entry in seen[1:] if not entry[1].startswith("eval/")]
    assert [number for number, _ in told] == list(range(step + 1, 5))
    evaluated = [number for number, name in seen[1:] if name.startswith("eval/")]
    assert evaluated == ([4] if step else [0, 4])


def test_an_evaluation_before_training_that_is_not_made_again_stays_drawn(
    tiny_folder, tmp_path, monkeypatch
):
    """The first life ends in step 1: its checkpoint knows that step 0 was evaluated."""
    lives = []

    def begin(self, run, *, redone_from=None):
        lives.append([redone_from])
        return Tracker(lambda step, metrics: lives[-1].append(step), lambda: None)

    def interrupted(run, state):
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr("gruppo.recipe.session.client_of", lambda kind: None)
    monkeypatch.setattr(Wandb, "start", begin)
    given = recipe(tiny_folder, **WITH_TRACKER, **{"train.steps": "1"})
    with monkeypatch.context() as patch:
        patch.setattr("gruppo.train.iterate", interrupted)
        with start(given, tmp_path / "run", silent) as session, pytest.raises(Interrupted):
            train(session.run, session.state)
    with resume(tmp_path / "run", silent) as session:
        assert (session.state.step, session.state.evaluated) == (0, 0)
        train(session.run, session.state)
    assert lives == [[None, 0], [1, 1, 1]]  # step 1 and the evaluation after it


@pytest.mark.parametrize("exists", [False, True])
def test_a_tracker_that_cannot_start_leaves_the_name_free(
    tiny_folder, tmp_path, monkeypatch, capsys, exists
):
    def begin(self, run, *, redone_from=None):
        assert (run.path / "recipe.toml").is_file()
        raise RuntimeError(
            "api_key not configured (no-tty)"
        )  # as wandb's own errors are no OSError

    monkeypatch.setattr("gruppo.recipe.session.client_of", lambda kind: None)
    monkeypatch.setattr(Wandb, "start", begin)
    if exists:
        (tmp_path / "run").mkdir()
    command = ["train", "quickstart", *arguments(tiny_folder, "run", **WITH_TRACKER)]
    assert main([*command, "--set", f"record.folder={tmp_path}"]) == 3
    shown = capsys.readouterr().err
    assert "record.trackers: wandb could not be started: api_key not configured" in shown
    assert "take it out of record.trackers" in shown
    assert [entry.name for entry in tmp_path.rglob("*")] == ["run"] * exists


def test_a_tracker_that_cannot_go_on_leaves_the_run(finished, tmp_path, monkeypatch, capsys):
    def begin(self, run, *, redone_from=None):
        raise RuntimeError("no network")

    cut = cut_after(finished, 2, tmp_path / "run")
    text = (cut / "recipe.toml").read_text()
    (cut / "recipe.toml").write_text(text.replace("trackers = []", 'trackers = [{kind = "wandb"}]'))
    monkeypatch.setattr("gruppo.recipe.session.client_of", lambda kind: None)
    monkeypatch.setattr(Wandb, "start", begin)
    assert main(["resume", str(cut)]) == 3
    assert "recipe.toml" in capsys.readouterr().err
    assert checkpoint.steps(cut / "checkpoints") == [2]


def test_a_run_that_patience_ended_is_told_in_the_same_order_again(tiny_folder, tmp_path, capsys):
    """The second time nothing is left to do: all comes from the database."""
    changes = {"eval.every": "1", "eval.patience": "1", "eval.samples": "2", "eval.k": "[2, 1]"}
    command = ["train", "quickstart", *arguments(tiny_folder, "run", **changes)]
    orders = []
    for words in (
        [*command, "--set", f"record.folder={tmp_path}"],
        ["resume", str(tmp_path / "run")],
    ):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert "stopped by eval.patience" in shown
        table = shown.partition("before    after\n")[2].partition("\n\n")[0]
        orders.append([line.split()[0] for line in table.splitlines()])
    assert orders[0] == orders[1]
    assert orders[0][:2] == ["pass@1", "len"]


# Time -------------------------------------------------------------------------------------------


def test_the_time_limit_counts_from_before_the_libraries_are_loaded(monkeypatch):
    seen = []

    def slow(name, settings):
        seen.append(time.monotonic())
        return load(name, settings)

    def begin(recipe, name, console, *, began):
        seen.append(began)
        return 0

    monkeypatch.setattr("gruppo.recipe.load", slow)
    monkeypatch.setattr("gruppo.cli.training.start", begin)
    before = time.monotonic()
    assert main(["train", "quickstart"]) == 0
    loaded, began = seen
    assert before <= began <= loaded


def test_the_budget_of_a_run_counts_from_where_it_is_told(tiny_folder, tmp_path):
    with start(recipe(tiny_folder), tmp_path / "run", silent, began=5.0) as session:
        assert session.run.budget.began == 5.0
        train(replaced(session.run, steps=1), session.state)
    with resume(tmp_path / "run", silent, began=7.0) as session:
        assert session.run.budget.began == 7.0


def test_the_end_of_a_resumed_run_compares_with_the_start(finished, tmp_path, capsys):
    cut = cut_after(finished, 2, tmp_path / "run")
    assert main(["resume", str(cut)]) == 0
    shown = capsys.readouterr().out
    assert "before    after" in shown
    assert shown.count("before (reward") == shown.count("after (reward") == 2


def test_a_recorded_evaluation_comes_back(finished):
    with Database(finished / "run.sqlite", read_only=True) as database:
        found = read_evaluation(database, 0)
        samples = database.samples(0)
        assert read_evaluation(database, 3) is None
    assert [graded.completions[0].text for graded in found.greedy] == [s.text for s in samples]
    assert [graded.problem.id for graded in found.greedy] == [s.problem for s in samples]
    assert [graded.scores[0].task for graded in found.greedy] == [s.task for s in samples]
    tasks = [sample.task for sample in samples]
    assert found.metrics["answer_mean"] == pytest.approx(sum(tasks) / 3)
