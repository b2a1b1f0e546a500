"""What the README and the guide show is true: their Python sessions run and give what they say."""

import re
from pathlib import Path

import pytest
import torch

from gruppo.policy import checkpoint
from gruppo.recipe import load
from support.commands import SETTINGS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def sessions(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_python_session_trains(tiny_folder, tmp_path, monkeypatch, capsys):
    """As it stands but for the model and the sizes, which are those of the tests."""
    (session,) = sessions(README)
    assert len(session.splitlines()) <= 12
    given = []

    def small(name, settings):
        given.append(name)
        sizes = [f"{key}={value}" for key, value in SETTINGS.items() if key != "train.steps"]
        return load(name, [f"model.name={tiny_folder}", *sizes, *settings])

    monkeypatch.setattr("gruppo.recipe.load", small)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(session, names)
    assert given == ["quickstart"]
    outcome = names["outcome"]
    assert (outcome.state.step, outcome.ended_by) == (5, "steps")
    assert checkpoint.steps(tmp_path / "runs" / "first" / "checkpoints") == [2, 4, 5]
    *_, last = capsys.readouterr().out.splitlines()
    before, after = outcome.before.metrics["pass@1"], outcome.after.metrics["pass@1"]
    assert last == f"{before} -> {after}"


def test_the_guide_s_loss_has_the_gradient_it_says():
    (session,) = [s for s in sessions((ROOT / "docs/guide.md").read_text()) if "backward" in s]
    names: dict[str, object] = {}
    exec(session, names)
    advantage, gradient = names["advantage"], names["logp"].grad
    assert advantage.tolist() == pytest.approx([0.8658754, -0.8658754, -0.8658754, 0.8658754])
    # on-policy every token's gradient is -A / N
    expected = (-advantage[:, None] / 12).expand(4, 3)
    assert torch.allclose(gradient.double(), expected, atol=1e-7)


def test_the_files_it_names_are_there():
    names = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    assert len(names) >= 7
    assert [
        name for name in names if not name.startswith("http") and not (ROOT / name).exists()
    ] == []
