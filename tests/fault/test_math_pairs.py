"""The math reward on pairs that checkers stumble over: the right verdict or none, in bounds."""

import pytest

from gruppo.reward import Math
from gruppo.reward.math_text import compare_exactly, tidy
from gruppo.types import Completion, Problem, Score
from support.math_pairs import DIFFERENT, EQUAL, HUGE, REFUSED, UNSCORED


def row(text):
    return Completion(tokens=(), logp=(), mask=(), version=(), text=text, finish="stop")


def verdicts(reward, pairs):
    groups = [
        (Problem(id=str(n), prompt=(), answer=gold), [row(rf"\boxed{{{answer}}}")])
        for n, (gold, answer) in enumerate(pairs)
    ]
    return [
        f"{value.error.fault}/{value.error.kind}" if isinstance(value, Score) else value
        for [value] in reward.score_batch(groups)
    ]


@pytest.fixture(scope="module")
def math():
    # as fast as the machine allows: processor time is what is limited
    reward = Math(cpu_s=0.7, workers=1)
    yield reward
    reward.close()


def mistaken(reward, pairs, expected):
    found = zip(pairs, verdicts(reward, pairs), expected, strict=True)
    return [(pair, verdict) for pair, verdict, right in found if verdict != right]


def test_the_table_is_large_and_has_no_pair_twice():
    pairs = [pair[:2] for pair in (*EQUAL, *DIFFERENT, *REFUSED, *UNSCORED, *HUGE)]
    assert len(pairs) >= 240
    assert len(set(pairs)) == len(pairs)


def test_what_is_decided_without_symbolic_mathematics_is_decided_right():
    table = [(*pair, 1.0) for pair in EQUAL] + [(*pair, 0.0) for pair in DIFFERENT]
    found = [
        (gold, answer, compare_exactly(tidy(gold), tidy(answer)), right)
        for gold, answer, right in table
    ]
    decided = [entry for entry in found if entry[2] is not None]
    assert [entry for entry in decided if entry[2] != entry[3]] == []
    assert len(decided) >= 120


@pytest.mark.slow
def test_notations_of_one_answer_are_equal(math):
    assert mistaken(math, EQUAL, [1.0] * len(EQUAL)) == []


@pytest.mark.slow
def test_answers_that_only_look_alike_differ(math):
    assert mistaken(math, DIFFERENT, [0.0] * len(DIFFERENT)) == []


@pytest.mark.slow
def test_what_cannot_be_compared_is_told_from_what_differs(math):
    table = (*REFUSED, *UNSCORED)
    assert mistaken(math, [row[:2] for row in table], [row[2] for row in table]) == []


def test_the_last_of_several_boxed_answers_counts(math):
    problem = Problem(id="p", prompt=(), answer="2")
    texts = (r"\boxed{1} or \boxed{2}", r"\boxed{2} or \boxed{1}", r"\boxed{\boxed{2}}", "2")
    values = math(problem, [row(text) for text in texts])
    assert values[:3] == [1.0, 0.0, 1.0]
    assert values[3].error.kind == "no_answer"


@pytest.mark.slow
def test_huge_numbers_take_their_time_and_no_more_and_the_next_is_exact():
    reward = Math(cpu_s=0.5, workers=1, memory_gib=1.0)
    try:
        assert mistaken(reward, HUGE, ["completion/timeout"] * len(HUGE)) == []
        hostile = (("2", "(x+y+z+1)^{300}"), ("2", "9^{9^{9}}"), (r"\sqrt{8}", r"2\sqrt{2}"))
        first, second, honest = verdicts(reward, hostile)
        assert {first, second} <= {"completion/timeout", "completion/memory", 0.0}
        assert honest == 1.0
        assert len(reward._pool().pids()) == 1
    finally:
        reward.close()
