"""The run directory: names, files, ids, what is written about the surroundings."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from gruppo.record import RunDirectory
from gruppo.record.surroundings import git_commit, versions

RECIPE = '[train]\nsteps = 3\n[model]\nname = "tiny"\n'


def test_create_writes_recipe_and_run_json(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "runs" / "a", RECIPE, meta={"command": ["x"]}) as run:
        assert run.name == "a"
        assert run.recipe_text().endswith(RECIPE)
        heading = run.recipe_text().removesuffix(RECIPE).splitlines()
        assert heading[0] == f"# run a ({run.id})"
        assert f"python {platform.python_version()}" in heading[1]
        assert f"torch {metadata.version('torch')}" in heading[1]
        assert run.checkpoints == run.path / "checkpoints"
        assert (run.checkpoints.is_dir(), run.dumps.is_dir()) == (True, True)
    info = json.loads((tmp_path / "runs" / "a" / "run.json").read_text())
    assert info["id"] == run.id
    assert len(run.id) == 16
    assert info["meta"] == {"command": ["x"]}
    assert info["versions"]["transformers"] == metadata.version("transformers")
    assert info["format"] == 1


def test_what_is_remembered_later_stands_beside_what_was(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "a", RECIPE, meta={"command": ["x"]}) as run:
        run.remember("later", [{"at": f"{Path.home()}/b"}])
        run.remember("later", [*run.info["meta"]["later"], 2])
    info = json.loads((tmp_path / "a" / "run.json").read_text())
    assert info["meta"] == {"command": ["x"], "later": [{"at": "~/b"}, 2]}
    assert info == run.info


def test_open_finds_the_same_run(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "a", RECIPE) as run:
        pass
    with RunDirectory.open(tmp_path / "a") as again:
        assert again.id == run.id
        assert again.recipe_text() == run.recipe_text()
        with RunDirectory.open(tmp_path / "a", lock=False) as onlooker:
            assert onlooker.id == run.id


def test_second_run_in_one_folder_is_refused(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "a", RECIPE):
        for start in (
            lambda: RunDirectory.open(tmp_path / "a"),
            lambda: RunDirectory.create(tmp_path / "a", RECIPE),
        ):
            with pytest.raises(ValueError, match=r"a is in use by process \d+ on .*another name"):
                start()
    with pytest.raises(ValueError, match=r"is not empty \(it holds checkpoints\).*gruppo resume"):
        RunDirectory.create(tmp_path / "a", RECIPE)
    RunDirectory.open(tmp_path / "a").close()


def test_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"it holds thesis\.tex"):
        RunDirectory.create(tmp_path, RECIPE)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match=r"thesis\.tex is no folder"):
        RunDirectory.create(tmp_path / "thesis.tex", RECIPE)
    with pytest.raises(ValueError, match="holds no run"):
        RunDirectory.open(tmp_path)


def test_a_start_that_was_cut_short_can_be_repeated(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "a", RECIPE).close()
    (tmp_path / "a" / "recipe.toml").unlink()
    with RunDirectory.create(tmp_path / "a", RECIPE) as run:
        assert run.recipe_text().endswith(RECIPE)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("...", "begin with a dot"),
        (".hidden", "begin with a dot"),
        ("a\nb", "printable"),
        ("a\x1b[31m", "printable"),
        ("\ud800", "printable"),
        ("a\\b", "backslash"),
        ("é" * 101, "202 bytes"),
    ],
)
def test_names_that_trip_others_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RunDirectory.create(tmp_path / name, RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_markup_in_a_name_is_only_a_name(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "<script>'\"&", RECIPE) as run:
        assert run.recipe_text().startswith("# run <script>'\"& (")


def test_tracker_id_stays_the_same(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "a", RECIPE) as run:
        first = run.tracker_id("wandb")
        other = run.tracker_id("trackio")
        assert len({first, other, run.id}) == 3
    with RunDirectory.open(tmp_path / "a") as run:
        assert (run.tracker_id("wandb"), run.tracker_id("trackio")) == (first, other)


def test_damaged_or_newer_run_json_is_an_os_error(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "a", RECIPE).close()
    file = tmp_path / "a" / "run.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps({**good, "format": 2}))
    with pytest.raises(OSError, match="newer gruppo"):
        RunDirectory.open(tmp_path / "a")
    for bad in ("[]", "{}", "{"):
        file.write_text(bad)
        with pytest.raises(OSError, match=r"run\.json"):
            RunDirectory.open(tmp_path / "a")
    file.write_text(json.dumps(good))
    RunDirectory.open(tmp_path / "a").close()  # no failed attempt kept the lock


def test_git_commit_with_and_without_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *who, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-qm", "c")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "f").write_text("2")
    assert git_commit(tmp_path) == commit + "+changes"


def test_versions_name_only_what_is_installed() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["gruppo"] == metadata.version("gruppo")
    assert all(metadata.version(name) == v for name, v in found.items() if name != "python")
