"""The page on rewards tells the truth: its recipes load, its kinds are all there are."""

import re
from pathlib import Path

import pytest

from gruppo.recipe import load
from gruppo.reward import KINDS, RewardSet

TEXT = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
RECIPES = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
REST = '[model]\nname = "x/y"\n[[data.train]]\nkind = "task"\nname = "countdown"\n'
TASK = '[[reward.parts]]\nname = "task"\nkind = "countdown"\n'


@pytest.mark.parametrize("text", RECIPES)
def test_its_recipes_load(text, tmp_path):
    (tmp_path / "r.toml").write_text(REST + ("" if "[reward]" in text else TASK) + text)
    parts = load(str(tmp_path / "r.toml")).reward.build(max_tokens=512).parts
    names = re.findall(r'^name = "(.*?)"', text, re.MULTILINE)
    assert [part.name for part in parts if part.name != "task"] == names


def test_it_names_every_kind_and_no_other():
    rows = TEXT.split("| kind | value |")[1].split("\n\n")[0].splitlines()[2:]
    named = [kind for row in rows for kind in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(KINDS)


def test_its_python_session_runs():
    [session] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, object] = {}
    exec(session, names)
    rewards = names["rewards"]
    assert isinstance(rewards, RewardSet)
    assert rewards.at(200).part_weights == pytest.approx((1.0, 0.1, 0.2))
