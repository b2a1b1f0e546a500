"""How a run's programs are run: said at its start and end, kept in its folder, told on resume."""

import json
from pathlib import Path

import pytest

from gruppo.cli import main
from gruppo.recipe import load
from gruppo.recipe.session import resume, start
from gruppo.train import train
from support.boxes import linux

pytestmark = linux


def few(tiny_folder: Path, kind: str) -> list[str]:
    return [
        f"model.name={tiny_folder}",
        "data.train.0.size=100",
        "data.train.1.size=100",
        "data.train.0.prompting={}",
        "data.train.1.prompting={}",
        "data.held_out=4",
        "rollout.prompts_per_step=2",
        "rollout.group_size=2",
        "rollout.max_tokens=8",
        "train.steps=1",
        f"reward.parts.0.sandbox={{kind = '{kind}'}}",
    ]


@pytest.mark.slow
def test_a_run_without_a_box_says_so_at_its_start_at_its_end_and_in_its_folder(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*few(tiny_folder, "unsafe-none"), f"record.folder={tmp_path}", "record.name=run"]
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", "code_tasks", *words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    started, _, ended = shown.partition("step 1/1")
    warning = "tests: programs run with NO SANDBOX, with all rights of this process"
    assert f"reward {warning}" in started
    assert warning in ended
    meta = json.loads((tmp_path / "run" / "run.json").read_text())
    assert meta["meta"]["sandbox"] == {"tests": warning.removeprefix("tests: ")}


@pytest.mark.slow
def test_the_recipe_trains_a_step(tiny_folder: Path, tmp_path: Path) -> None:
    settings = few(tiny_folder, "lite")
    told: list[str] = []
    with start(load("code_tasks", settings), tmp_path / "run", told.append) as session:
        outcome = train(session.run, session.state)
    assert outcome.state.step == 1
    assert any("programs run in the lite box" in line for line in told)
    meta = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "programs run in the lite box" in json.dumps(meta)


def test_a_resume_with_another_box_tells_and_keeps_both(tiny_folder: Path, tmp_path: Path) -> None:
    run, told = tmp_path / "run", []
    with start(load("code_tasks", few(tiny_folder, "lite")), run, told.append):
        pass
    boxed = meta_of(run)["sandbox"]
    assert boxed["tests"].startswith("programs run in the lite box")
    with resume(run, told.append):
        pass
    assert not [text for text in told if text.startswith("resumed with")]
    assert "sandbox_later" not in meta_of(run)
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace('kind = "lite"', 'kind = "unsafe-none"'))
    for _ in range(2):  # told and kept once
        with resume(run, told.append) as session:
            now = dict(session.sandboxes)
    assert "NO SANDBOX" in now["tests"]
    assert [text for text in told if text.startswith("resumed with")] == [
        f"resumed with tests: {now['tests']}; where the run had: {boxed['tests']}"
    ]
    assert meta_of(run)["sandbox"] == boxed
    assert meta_of(run)["sandbox_later"] == [{"after_step": 0, "sandbox": now}]


def meta_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())["meta"]
