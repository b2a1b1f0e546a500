"""The boundary: totals, task, shaping, clip, and which row each failure costs."""

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from gruppo.reward import (
    KINDS,
    SHAPE_KINDS,
    GradingModel,
    Part,
    RewardSet,
    Service,
    Shaping,
    SoftOverlong,
    refused,
    ungraded,
)
from gruppo.types import Completion, Failure, Problem, Score
from support.scores import count_failures

PROBLEM = Problem(id="p", prompt=(), answer="1")


def rows(*lengths: int) -> list[Completion]:
    return [
        Completion(
            tokens=(0,) * n, logp=(0.0,) * n, mask=(True,) * n, version=(0,) * n, text="",
            finish="stop",
        )
        for n in lengths
    ]  # fmt: skip


def fixed(*values: object):
    return lambda problem, completions: list(values)


def totals(scores: Sequence[Score]) -> list[float | None]:
    return [score.total for score in scores]


def test_total_is_the_weighted_sum_of_the_parts_that_gave_a_value() -> None:
    rewards = RewardSet(
        (
            Part(name="a", reward=fixed(1.0, 0.0, 1), weight=2.0),
            Part(name="b", reward=fixed(0.5, None, -1.0), weight=0.1),
        )
    )
    scores = rewards.score(PROBLEM, rows(1, 1, 1))
    assert totals(scores) == pytest.approx([2.05, 0.0, 1.9], abs=1e-12)
    assert [score.task for score in scores] == [1.0, 0.0, 1.0]
    assert scores[1].parts == {"a": 0.0, "b": None}
    assert scores[1].error is None
    assert (rewards.part_names, rewards.part_weights) == (("a", "b"), (2.0, 0.1))


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (None, "none"),
        (float("nan"), "nonfinite"),
        (float("inf"), "nonfinite"),
        (1e308, "magnitude"),
        (10**400, "nonfinite"),
        (True, "type"),
        ("1.0", "type"),
        ([1.0], "type"),
        (ungraded("down", "judge is down"), "down"),
        (Score(total=float("nan"), task=1.0), "nonfinite"),
    ],
)
def test_a_bad_value_unscores_its_own_row_only(bad: object, kind: str) -> None:
    scores = RewardSet((Part(name="a", reward=fixed(1.0, bad, 0.0)),)).score(PROBLEM, rows(1, 1, 1))
    assert totals(scores) == [1.0, None, 0.0]
    assert scores[1].task is None
    assert count_failures(scores) == {f"grader/{kind}": 1}


@pytest.mark.parametrize(("weight", "expected"), [(0.5, [1.0, None, 0.5]), (0.0, [1.0, 1.0, 0.0])])
def test_a_failed_grader_of_a_weighted_part_unscores_the_row(weight, expected) -> None:
    # None is a choice (the others are summed), NaN a failure: its total would lack a term that
    # the rest of the group has; a part that is only watched costs nothing
    parts = (
        Part(name="task", reward=fixed(1.0, 1.0, 0.0)),
        Part(name="extra", reward=fixed(None, float("nan"), 1.0), weight=weight),
    )
    scores = RewardSet(parts).score(PROBLEM, rows(1, 1, 1))
    assert totals(scores) == expected
    assert [score.task for score in scores] == [1.0, 1.0, 0.0]
    assert scores[1].parts == {"task": 1.0, "extra": None}
    assert count_failures(scores) == {"grader/nonfinite": 1}
    assert scores[1].error is not None
    assert scores[1].error.fault == "grader"


def test_a_task_that_could_not_be_graded_unscores_the_row_at_any_weight() -> None:
    parts = (
        Part(name="right", reward=fixed(float("nan"), 1.0), weight=0.0),
        Part(name="extra", reward=fixed(0.25, 0.25)),
    )
    scores = RewardSet(parts).score(PROBLEM, rows(1, 1))
    assert [(score.total, score.task) for score in scores] == [(None, None), (0.25, 1.0)]
    assert count_failures(scores) == {"grader/nonfinite": 1}


def test_the_failure_that_unscored_a_row_is_the_one_that_is_told() -> None:
    parts = (
        Part(name="task", reward=fixed(refused("unreadable", "x"))),
        Part(name="judge", reward=fixed(ungraded("down", "y")), weight=0.5),
    )
    assert count_failures(RewardSet(parts).score(PROBLEM, rows(1))) == {"grader/down": 1}


def test_the_first_of_several_task_parts_that_gave_a_value_is_the_task() -> None:
    parts = (
        Part(name="math", reward=fixed(1.0, None, None)),
        Part(name="code", reward=fixed(None, 0.5, None)),
        Part(name="format", reward=fixed(1.0, 1.0, 1.0), weight=0.1),
    )
    scores = RewardSet(parts, task=("math", "code")).score(PROBLEM, rows(1, 1, 1))
    assert [score.task for score in scores] == [1.0, 0.5, None]
    assert totals(scores) == [1.1, 0.6, None]


def test_a_completion_that_breaks_its_grading_gets_the_minimum() -> None:
    parts = (
        Part(name="a", reward=fixed(refused("timeout", "x"), 0.0), minimum=-1.0, weight=2.0),
        Part(name="b", reward=fixed(1.0, 1.0)),
    )
    scores = RewardSet(parts).score(PROBLEM, rows(1, 1))
    assert totals(scores) == [-1.0, 1.0]
    assert scores[0].task == -1.0
    assert scores[0].error == Failure(kind="timeout", fault="completion", text="x")


@pytest.mark.parametrize("result", ["ab", {"a": 1}, 3, None, b"12"])
def test_a_result_that_is_no_list_unscores_the_group(result: object) -> None:
    rewards = RewardSet((Part(name="a", reward=lambda p, c: result),))
    scores = rewards.score(PROBLEM, rows(1, 1))
    assert totals(scores) == [None, None]
    assert count_failures(scores) == {"grader/type": 2}


def test_a_wrong_number_of_values_unscores_its_group_only() -> None:
    def reward(problem: Problem, completions: Sequence[Completion]) -> list[float]:
        return [1.0] * (len(completions) if problem.id == "ok" else 1)

    rewards = RewardSet((Part(name="a", reward=reward),))
    good, bad = rewards.score_groups(
        [(Problem(id="ok", prompt=()), rows(1, 1)), (Problem(id="bad", prompt=()), rows(1, 1))]
    )
    assert (totals(good), totals(bad)) == ([1.0, 1.0], [None, None])
    assert count_failures([*good, *bad]) == {"grader/length": 2}


@pytest.mark.parametrize(
    ("error", "kind"), [(ValueError("x"), "exception"), (SystemExit(3), "exit")]
)
def test_exceptions_and_sys_exit_unscore_their_group_only(error: BaseException, kind: str) -> None:
    def reward(problem: Problem, completions: Sequence[Completion]) -> list[float]:
        if problem.id == "bad":
            raise error
        return [0.25 for _ in completions]

    rewards = RewardSet((Part(name="part", reward=reward),))
    bad, good = rewards.score_groups(
        [(Problem(id="bad", prompt=()), rows(1)), (Problem(id="ok", prompt=()), rows(1))]
    )
    assert totals(good) == [0.25]
    assert count_failures(bad) == {f"grader/{kind}": 1}
    assert bad[0].error is not None
    assert bad[0].error.text.startswith(f"part: {type(error).__name__}: ")
    assert "test_reward_set.py:" in bad[0].error.text


def test_ctrl_c_is_no_failure_of_the_reward() -> None:
    def reward(problem: Problem, completions: Sequence[Completion]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardSet((Part(name="a", reward=reward),)).score(PROBLEM, rows(1))


def test_numpy_values_are_numbers() -> None:
    rewards = RewardSet((Part(name="a", reward=lambda p, c: np.array([1, 0.5], np.float32)),))
    assert totals(rewards.score(PROBLEM, rows(1, 1))) == [1.0, 0.5]


def test_shaping_is_added_only_where_the_task_metric_varies() -> None:
    def task(problem: Problem, completions: Sequence[Completion]) -> list[float]:
        return [1.0, 0.0] if problem.id == "live" else [1.0, 1.0]

    overlong = Part(
        name="long", reward=SoftOverlong(max_tokens=10, buffer=5), weight=0.5, shape=True
    )
    parts = (Part(name="task", reward=task), overlong)
    groups = [(Problem(id="live", prompt=()), rows(10, 5)), (PROBLEM, rows(10, 5))]
    live, dead = RewardSet(parts).score_groups(groups)
    assert (totals(live), totals(dead)) == ([0.5, 0.0], [1.0, 1.0])
    assert [score.task for score in live] == [1.0, 0.0]
    assert dead[0].parts == {"task": 1.0, "long": -1.0}
    everywhere = RewardSet(parts, shape_only_live=False)
    assert totals(everywhere.score_groups(groups)[1]) == [0.5, 1.0]
    assert everywhere.part_names == ("task",)


def test_rows_without_a_total_do_not_make_a_group_live() -> None:
    """The only right row is unscored: length alone must not decide among the others."""
    parts = (
        Part(name="task", reward=fixed(1.0, 0.0, 0.0, 0.0)),
        Part(name="style", reward=fixed(float("nan"), 0.25, 0.25, 0.25)),
        Part(name="length", reward=KINDS["kimi_length"](), shape=True),
    )
    scores = RewardSet(parts).score(PROBLEM, rows(1, 2, 5, 9))
    assert totals(scores) == [None, 0.25, 0.25, 0.25]
    assert [score.task for score in scores] == [1.0, 0.0, 0.0, 0.0]
    shaped = RewardSet(parts, shape_only_live=False).score(PROBLEM, rows(1, 2, 5, 9))
    assert totals(shaped) == [None, 0.25, 0.25, -0.25]  # without the rule, the longest is punished


def test_a_failing_shaping_term_unscores_where_it_counts() -> None:
    task = Part(name="task", reward=fixed(1.0, 0.0, 1.0))
    shape = Part(name="shape", reward=fixed("x", -0.5, None), shape=True)
    scores = RewardSet((task, shape)).score(PROBLEM, rows(1, 1, 1))
    assert totals(scores) == [None, -0.5, 1.0]
    assert scores[0].task == 1.0
    assert count_failures(scores) == {"grader/type": 1}
    dead = Part(name="task", reward=fixed(1.0, 1.0, 1.0))
    assert totals(RewardSet((dead, shape)).score(PROBLEM, rows(1, 1, 1))) == [1.0, 1.0, 1.0]
    watched = replace(shape, weight=0.0)
    assert totals(RewardSet((task, watched)).score(PROBLEM, rows(1, 1, 1))) == [1.0, 0.0, 1.0]


def test_clip_range_bounds_the_shaped_total() -> None:
    parts = (Part(name="task", reward=fixed(5.0, -5.0, 0.3)),)
    scores = RewardSet(parts, clip_range=(-1.0, 1.0)).score(PROBLEM, rows(1, 1, 1))
    assert totals(scores) == [1.0, -1.0, 0.3]
    assert scores[0].task == 5.0


def test_an_empty_batch_and_an_empty_group_score_to_nothing() -> None:
    rewards = RewardSet((Part(name="a", reward=fixed()),))
    assert rewards.score_groups([]) == []
    assert rewards.score(PROBLEM, []) == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardSet(()), "no part but shaping"),
        (lambda: RewardSet((Part(name="a", reward=fixed()),) * 2), "share the name 'a'"),
        (lambda: RewardSet((Part(name="a", reward=fixed()),), task="b"), "reward.task = 'b'"),
        (
            lambda: RewardSet((Part(name="a", reward=fixed()),), clip_range=(1.0, 1.0)),
            "reward.clip_range",
        ),
        (lambda: Part(name="", reward=fixed()), "Part.name is empty"),
        (lambda: Part(name="a", reward=fixed(), weight=float("nan")), "weight = nan"),
        (lambda: Part(name="a", reward=KINDS["kimi_length"]()), "set shape = true"),
    ],
)
def test_senseless_sets_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_every_kind_names_its_record() -> None:
    judged = {"model": GradingModel(name="m"), "service": Service(url="http://h/v1")}
    given = {
        "judge": {"rubric": "r", **judged},
        "pairwise": {"rubric": "r", **judged},
        "verifier": judged,
        "remote": {"service": Service(url="http://h")},
        "reward_model": {"name": "m"},
        "cosine_length": {"max_tokens": 4},
        "soft_overlong": {"max_tokens": 4, "buffer": 1},
        "function": {"name": "m:f"},
        "regex": {"pattern": "a"},
    }
    for kind, record in KINDS.items():
        made = record(**given.get(kind, {}))
        assert made.kind == kind
        assert made == record(**given.get(kind, {}))
        with pytest.raises(FrozenInstanceError):
            made.kind = "other"
        if isinstance(made, Shaping):
            assert kind in SHAPE_KINDS
