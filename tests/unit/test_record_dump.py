"""Dumped steps: whole, readable, with a command that names no home folder."""

import math
import shlex
from pathlib import Path

import pytest
import torch

from gruppo.policy.checkpoint import read_json, read_tensors
from gruppo.record import RunDirectory, dump_step, replay_command


@pytest.fixture
def run(tmp_path: Path):
    with RunDirectory.create(tmp_path / "my run", "") as opened:
        yield opened


def test_dump_comes_back(run: RunDirectory) -> None:
    tensors = {"tokens": torch.tensor([[1, 2]]), "logp": torch.tensor([math.nan, -math.inf, 0.1])}
    info = {"loss": math.nan, "grad_norm": math.inf, "rows": [1, 2.5], "what": "gradient"}
    folder = dump_step(run, 12, tensors, info)
    assert folder == run.path / "dumps" / "00000012"
    back, facts = read_tensors(folder / "tensors.safetensors"), read_json(folder / "info.json")
    assert torch.equal(back["tokens"], tensors["tokens"])
    assert torch.equal(back["logp"], tensors["logp"]) or math.isnan(back["logp"][0])
    assert back["logp"][1:].tolist() == tensors["logp"][1:].tolist()
    assert facts == {
        "loss": "nan",
        "grad_norm": "inf",
        "rows": [1, 2.5],
        "what": "gradient",
        "step": 12,
    }
    command = (folder / "replay.txt").read_text().strip()
    assert shlex.split(command) == ["gruppo", "resume", str(run.path), "--replay", "12"]


def test_second_dump_of_a_step_replaces_the_first(run: RunDirectory) -> None:
    for value in (1.0, 2.0):
        dump_step(run, 3, {"x": torch.tensor([value])}, {})
    kept = read_tensors(run.dumps / "00000003" / "tensors.safetensors")
    assert kept["x"].tolist() == [2.0]
    assert [p.name for p in run.dumps.iterdir()] == ["00000003"]


def test_command_names_no_home_folder(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run.path.parent))
    assert replay_command(run, 7) == "gruppo resume ~/'my run' --replay 7"


def test_failing_disk_is_an_os_error_with_the_path(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.dumps).rmdir()
    run.dumps.write_text("in the way")
    with pytest.raises(OSError, match="dumps"):
        dump_step(run, 1, {}, {})
