"""reasoning-gym itself (extra ``gym``), where it is installed: its problems and own answers."""

import importlib.util

import pytest

from gruppo.data.sources import Gym
from gruppo.reward import ReasoningGym
from gruppo.types import Completion


def row(text: str) -> Completion:
    return Completion(tokens=(), logp=(), mask=(), version=(), text=text, finish="stop")


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="not installed")
@pytest.mark.parametrize(
    "task", ["basic_arithmetic", "countdown", "knights_knaves", "maze", "tower_of_hanoi"]
)
def test_the_library_s_own_answers_score_and_its_problems_are_the_same_again(task: str) -> None:
    made, again = (Gym(task=task, size=3, seed=5).load() for _ in range(2))
    other = Gym(task=task, size=3, seed=6).load()
    assert [(p.prompt, p.info) for p in made] == [(p.prompt, p.info) for p in again]
    assert [p.prompt for p in made] != [p.prompt for p in other]
    reward = ReasoningGym(where="all", workers=3)  # a pool of no other test
    try:
        values = [reward(p, [row(p.answer or ""), row("quite wrong")]) for p in made]
    finally:
        reward.close()
    assert values == [[1.0, 0.0]] * 3
