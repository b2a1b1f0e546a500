"""The gym reward, against a stand-in for reasoning-gym that has its known traps."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gruppo.recipe import load
from gruppo.reward import Part, ReasoningGym, RewardSet
from gruppo.types import Completion, Problem

STAND_IN = """
import sys

def sums(answer, entry):
    if entry["metadata"]["pair"] != (1, 2): return 0.0  # types arrive as they were
    if answer == "spin":
        while True: pass
    if answer == "exit": sys.exit(1)
    return 1.0 if int(answer) == int(entry["answer"]) else 0.01  # raises where it is no number

def shares(answer, entry):
    return 0.5 if answer == "half" else 1.0 if answer == entry["answer"] else 0.0

def pays_for_anything(answer, entry):
    return 1.0

def exits_on_nonsense(answer, entry):
    if not answer: sys.exit("nothing")
    return float(answer == entry["answer"])

def beyond(answer, entry):
    return 2.0

def reaches(answer, entry):
    import os, socket
    if not answer.startswith("/"): return 0.0
    for act in (
        os.fork,
        socket.socket,
        lambda: open(answer, "w"),
        lambda: os.kill(os.getppid(), 0),
        lambda: os.execv("/bin/true", ["true"]),
    ):
        try: act()
        except OSError: continue
        return 0.0
    return float(len(open(__file__).read()) > 100)  # it reads: a library loads what it needs

def get_score_answer_fn(name):
    known = (sums, shares, exits_on_nonsense, pays_for_anything, beyond, reaches)
    for scorer in known:
        if scorer.__name__ == name: return scorer
    raise ValueError(f"Dataset '{name}' not registered")
"""


@pytest.fixture(scope="module")
def gym(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReasoningGym]:
    folder = tmp_path_factory.mktemp("library")
    (folder / "reasoning_gym.py").write_text(STAND_IN)
    reward = ReasoningGym(where="all")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        reward.open()
        yield reward
        reward.close()


BROKEN = {"task": "sums", "entry": {"question": "q", "answer": "3"}}


def row(text: str) -> Completion:
    return Completion(tokens=(), logp=(), mask=(), version=(), text=text, finish="stop")


def problem(task: str, answer: str = "3") -> Problem:
    entry = {"question": "q", "answer": answer, "metadata": {"pair": (1, 2)}}
    return Problem(id="p", prompt=(), answer=answer, info={"task": task, "entry": entry})


def graded(reward: ReasoningGym, task: str, *texts: str) -> list[float | str | None]:
    """Value of each text, or the side and kind of its failure."""
    part = Part(name="gym", reward=reward, minimum=-1.0)
    scores = RewardSet((part,)).score(problem(task), [row(text) for text in texts])
    return [s.total if s.error is None else f"{s.error.fault}/{s.error.kind}" for s in scores]


def test_only_a_full_score_counts_unless_partial_ones_are_asked_for(gym: ReasoningGym) -> None:
    assert graded(gym, "sums", "3", "<think>4</think>3", "4") == [1.0, 1.0, 0.0]
    assert graded(gym, "shares", "3", "half", "x") == [1.0, 0.0, 0.0]
    lenient = ReasoningGym(where="all", partial=True)
    assert graded(lenient, "shares", "3", "half", "x") == [1.0, 0.5, 0.0]
    assert graded(lenient, "sums", "3", "4") == [1.0, 0.0]  # .01 is what nonsense gets too


def test_an_answer_may_be_twice_as_long_as_the_entry_s_own(gym: ReasoningGym) -> None:
    """Moves of a puzzle: the library's own answer to a tower of Hanoi has 4063 characters."""
    moves = "move " * 799 + "move"
    part = RewardSet((Part(name="gym", reward=gym),))
    texts = [moves, "x" * 7998, "x" * 7999]
    scores = part.score(problem("shares", moves), [row(text) for text in texts])
    assert [s.total for s in scores] == [1.0, 0.0, 0.0]
    assert [s.error.kind if s.error else None for s in scores] == [None, None, "oversize"]
    tagged = ReasoningGym()
    found = graded(tagged, "shares", f"<answer>{'x' * 2001}</answer>")
    assert found == ["completion/oversize"]  # this entry's own answer is short


def test_a_task_that_pays_for_anything_pays_for_nothing(gym: ReasoningGym) -> None:
    assert graded(gym, "pays_for_anything", "3", "whatever") == [0.0, 0.0]


def test_the_answer_s_fault_is_the_completion_s_and_the_library_s_the_grader_s(
    gym: ReasoningGym,
) -> None:
    found = graded(gym, "sums", "3", "three", "spin", "3" * 100_000, "3")
    assert found == [1.0, "completion/unreadable", "completion/timeout", "completion/oversize", 1.0]
    assert graded(gym, "beyond", "3") == ["grader/range"]
    assert graded(gym, "nope", "3") == ["grader/exception"]
    assert graded(gym, "sums", "3", "exit", "3") == [1.0, "grader/exit", 1.0]
    part = Part(name="gym", reward=gym, minimum=-1.0)
    (score,) = RewardSet((part,)).score(problem("sums"), [row("exit")])
    assert "the scorer asked the program to end (sys.exit(1))" in score.error.text
    assert graded(gym, "exits_on_nonsense", "3", "4") == [1.0, 0.0]
    other = RewardSet((Part(name="gym", reward=gym),))
    (score,) = other.score(Problem(id="p", prompt=(), answer="3"), [row("3")])
    assert (score.total, score.error.kind) == (None, "gold_missing")
    (score,) = other.score(replace(problem("sums"), info=BROKEN), [row("three")])
    assert (score.total, score.error.fault) == (None, "grader")
    assert "KeyError: 'metadata'" in score.error.text
    tagged = ReasoningGym()
    assert graded(tagged, "sums", "3", "<answer>3</answer>") == ["completion/no_answer", 1.0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no filter")
def test_what_an_answer_evaluates_reaches_nothing(gym: ReasoningGym, tmp_path: Path) -> None:
    """1 if a scorer could not write, fork, connect, signal or execute, but read."""
    assert graded(gym, "reaches", f"{tmp_path}/made", "x") == [1.0, 0.0]
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = ReasoningGym(workers=2)  # another pool than the other tests'
    with pytest.raises(
        ValueError, match=r"^gym reward: ImportError: .*pip install \"gruppo\[gym\]\""
    ):
        reward.open()
    with pytest.raises(ValueError, match=r"gym\.workers = 0"):
        ReasoningGym(workers=0)


def test_a_recipe_names_it_and_its_own_answers_can_be_tried() -> None:
    settings = ["reward.parts.answer={name = 'answer', kind = 'gym', where = 'boxed'}"]
    recipe = load("quickstart", [*settings, "reward.answer_template=auto"])
    assert recipe.reward.own_answer() == "\\boxed{{answer}}"
