"""The Countdown reward: exact values, numbers once each, hostile text."""

from fractions import Fraction

import pytest

from gruppo.data.tasks import Countdown as Task
from gruppo.reward.countdown import Countdown, evaluate
from gruppo.types import Completion, Problem


def row(text):
    return Completion(tokens=(), logp=(), mask=(), version=(), text=text, finish="stop")


PROBLEM = Problem(id="p", prompt=(), info={"numbers": [3, 7, 7, 25], "target": 46})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<answer>25 + 7 * 3</answer>", 0.0),  # a 7 is missing
        ("<answer>7 * 7 - 3</answer>", 0.0),  # 46, but 25 is missing
        ("<answer>25 + 7 + 7 * 3 - 7</answer>", 0.0),  # a 7 too many
        ("<answer>25 + (7 * 3) + 7 - 7</answer>", 0.0),
        ("<answer>7 * 7 + 25 - 3</answer>", 0.0),  # every number once, but 71
        ("<answer>25 + 7 + 7 * 2</answer>", 0.0),  # 46 with a number that is not there
        ("<answer>46</answer>", 0.0),
        ("<answer>25 / 0</answer>", 0.0),
        ("<answer>2 ** 9999999999</answer>", 0.0),
        ("<answer>" + "(" * 99 + "1" + ")" * 99 + "</answer>", 0.0),
        ("<answer>__import__('os')</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_wrong_and_hostile_answers_score_nothing(text, value):
    assert Countdown()(PROBLEM, [row(text)]) == [value]


def test_right_answers_score_one_with_and_without_the_equation():
    problem = Problem(id="p", prompt=(), info={"numbers": [3, 7, 25], "target": 46})
    texts = ["<answer>7 * 3 + 25</answer>", "<answer>25+(3*7) = 46</answer>", "25 + 21"]
    assert Countdown()(problem, [row(text) for text in texts]) == [1.0, 1.0, 0.0]
    assert Countdown(where="all")(problem, [row("<think>hm</think> 25 + 3 * 7")]) == [1.0]


def test_the_task_s_own_answers_are_right():
    for index in range(50):
        item = Task(count=4)(seed=3, index=index)
        problem = Problem(id="p", prompt=(), answer=item.answer, info=item.info)
        assert Countdown(where="all")(problem, [row(item.answer)]) == [1.0]


def test_division_is_exact():
    assert evaluate("1 / 3", [1, 3]) == Fraction(1, 3)


def test_a_problem_of_another_task_is_unscored_not_wrong():
    score = Countdown()(Problem(id="p", prompt=()), [row("1")])[0]
    assert (score.total, score.error.fault) == (None, "grader")
