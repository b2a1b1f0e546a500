"""Forty bad recipes: each refused with exit code 2, the key path, and nothing opened or written."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gruppo.cli import main

GOOD = """
[model]
name = "/nowhere/model"
[[data.train]]
kind = "jsonl"
path = "/nowhere/data.jsonl"
[[reward.parts]]
name = "right"
kind = "number"
"""
PART = '[[reward.parts]]\nname = "{}"\nkind = "{}"\n'

# What is appended to the good recipe (or put in its place), and words that the answer must hold.
BAD = [
    ("[train]\nstep = 3", ["train.step", 'did you mean "steps"']),
    ("[trian]\nsteps = 3", ["trian", 'did you mean "train"']),
    ("[train]\nsteps = 0", ["train", "steps = 0"]),
    ("[train]\nsteps = -5", ["train", "steps = -5"]),
    ('[train]\nsteps = "50"', ["train.steps", "whole number"]),
    ("[train]\nsteps = 50.0", ["train.steps", "whole number"]),
    ("[train]\nsteps = true", ["train.steps", "whole number"]),
    ("[train]\nsteps = 2026-01-01", ["train.steps", "whole number"]),
    ("[train]\nsteps = 99999999999999999999", ["train.steps", "too large"]),
    ("[train]\nsteps = [1]", ["train.steps", "whole number"]),
    ("train = 3", ["reward.parts.0.train", "unknown key"]),  # TOML: it belongs to the last table
    ("[train]\nseed = -1", ["train", "seed = -1"]),
    ("[train]\nminibatches = 100", ["train.minibatches", "whole groups"]),
    ("[optim]\nlr = nan", ["optim.lr", "finite"]),
    ("[optim]\nlr = inf", ["optim.lr", "finite"]),
    ("[optim]\nlr = -1e-6", ["optim", "lr = -1e-06"]),
    ('[optim]\nlr = "1e-6"', ["optim.lr", "number"]),
    ('[optim]\nschedule = "cosin"', ["optim.schedule", 'did you mean "cosine"']),
    ("[optim]\nbetas = [0.9]", ["optim.betas", "required"]),
    ("[optim]\nbetas = [0.9, 1.5]", ["optim", "betas"]),
    ("[rollout]\ntemperature = 0.0", ["rollout", "temperature"]),
    ("[rollout]\ntop_p = 0.9", ["rollout", "allow_truncated_sampling"]),
    ("[rollout]\ngroup_size = 1", ["rollout.group_size", "at least 2"]),
    ('[rollout]\nfilter = "resampel"', ["rollout.filter", 'did you mean "resample"']),
    ('[rollout]\nstop = "x"', ["rollout.stop", "list"]),
    ('[objective]\npreset = "dapoo"', ["objective.preset", 'did you mean "dapo"']),
    ('[objective]\npreset = "vapo"', ["objective.preset", "critic"]),
    ('[objective]\ncredit = "grop"', ["objective.credit.kind", 'did you mean "grpo"']),
    ("[objective.surrogate]\nepsilon = 0.1", ["objective.surrogate.epsilon", "unknown key"]),
    ('[objective]\nsurrogate = "gspo"', ["objective", "SeqMeanTokenMean"]),
    ('[objective]\ncredit = "no_such_module:X"', ["objective.credit", "cannot import"]),
    ("[objective.kl]\nbeta = -1.0", ["objective.kl", "beta"]),
    (
        '[objective.credit]\nkind = "kl_in_reward"\nbeta = 0.1\ncredit = "gdpo"',
        ["objective.credit", "has no effect", "KL term"],
    ),
    (
        '[objective.credit]\nkind = "passk_analytic"\nk = 9',
        ["rollout.group_size = 8", "at least 9"],
    ),
    (
        '[objective]\npreset = "gdpo"\n[rollout]\ntruncation = "zero_reward"',
        ['rollout.truncation = "zero_reward"', "has no effect", "mask_after"],
    ),
    ("[eval]\nk = [1, 16]\nsamples = 8", ["eval", "pass@16"]),
    (PART.format("x", "numbr"), ["reward.parts.1.kind", 'did you mean "number"']),
    (PART.format("right", "number"), ["reward", "share the name"]),
    (PART.format("x", "number") + 'were = "last"', ["reward.parts.1.were", '"where"']),
    ('[reward]\ntask = "rihgt"', ["reward", "rihgt", "right"]),
    ('[[data.train]]\nkind = "jsonl"', ["data.train.1.path", "required"]),
    ('[[data.train]]\nkind = "task"\nname = "countdwn"', ["data.train.1", "countdown"]),
    ("[data]\nheld_out = -1", ["data", "held_out"]),
    ("[model]\nname = 3", ["not valid TOML", "model"]),  # a second [model]
    ('[record]\nfolder = ""', ["record", "folder"]),
    ("[record.detail]\nevery = 0", ["record", "every"]),
    ("x = [", ["TOML"]),
]


@pytest.fixture
def nothing_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Run in an empty folder, where opening a model or data would fail the test."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a bad recipe must open nothing")

    monkeypatch.setattr("gruppo.data.sources.Jsonl.load", refuse)
    monkeypatch.setattr("gruppo.data.sources.TaskSource.load", refuse)
    monkeypatch.setattr("gruppo.recipe.build.load", refuse)
    monkeypatch.setattr("gruppo.cli.training.open_new", refuse)
    return tmp_path


def test_there_are_at_least_forty_bad_recipes():
    assert len(BAD) >= 40
    assert tomllib.loads(GOOD)["model"]["name"] == "/nowhere/model"


@pytest.mark.parametrize(("text", "words"), BAD)
def test_bad_recipe_is_refused(text, words, nothing_opened, capsys):
    file = nothing_opened / "bad.toml"
    file.write_text(GOOD + text)
    assert main(["train", str(file)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert str(file) in shown.err
    for word in words:
        assert word in shown.err
    assert [entry.name for entry in nothing_opened.iterdir()] == ["bad.toml"]


def test_all_mistakes_of_a_recipe_are_told_at_once(nothing_opened, capsys):
    file = nothing_opened / "bad.toml"
    joined = "\n".join(
        [
            "[trian]",
            "[train]\nstep = 3\nseed = -1",
            "[optim]\nlr = -1.0\nschedule = 'cosin'",
            "[rollout]\ngroup_size = 0",
            "[objective]\npreset = 'dappo'\ncredit = 'grop'",
            PART.format("x", "numbr"),
        ]
    )
    file.write_text(GOOD + joined)
    assert main(["train", str(file), "--set", "eval.sampels=3"]) == 2
    shown = capsys.readouterr().err
    for path in (
        "trian",
        "train.step ",
        "seed = -1",
        "lr = -1",
        "optim.schedule",
        "group_size = 0",
        "objective.preset",
        "objective.credit.kind",
        "reward.parts.1.kind",
        "eval.sampels",
    ):
        assert path in shown, path
    assert "10 mistakes" in shown


@pytest.mark.parametrize("name", ["no_such", "no/such.toml", ".", ""])
def test_missing_recipe_is_a_user_error(name, nothing_opened, capsys):
    assert main(["train", name]) == 2
    assert capsys.readouterr().err.startswith("error:")


def test_missing_sections_are_named(nothing_opened, capsys):
    (nothing_opened / "empty.toml").write_text("")
    assert main(["train", "empty.toml"]) == 2
    shown = capsys.readouterr().err
    for section in ("[model]", "[data]", "[reward]"):
        assert f"section {section} is required" in shown


def test_a_bad_recipe_is_refused_before_transformers_is_imported(tmp_path):
    (tmp_path / "bad.toml").write_text(GOOD + "[train]\nstep = 3")
    script = (
        "import sys; from gruppo.cli import main; code = main(['train', 'bad.toml']); "
        "print(code, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "False"]
