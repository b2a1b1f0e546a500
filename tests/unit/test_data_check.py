"""Reference answers against the reward, before training."""

import re

import pytest

from gruppo.data import TaskSource, check_answers
from gruppo.types import Failure, Message, Problem, Score

R1 = "<think></think><answer>{answer}</answer>"


def problem(name, answer):
    return Problem(id=name, prompt=(Message("user", name),), answer=answer)


def in_tags(problem, text):
    return float(re.fullmatch(r"<think>.*</think><answer>(.*)</answer>", text)[1] == problem.answer)


def test_right_answers_pass():
    problems = TaskSource(name="arithmetic", size=20).load()
    check = check_answers(problems, in_tags, answer_template=R1, sample=100)
    assert (check.ok, check.checked, check.failed) == (True, 20, ())
    assert check.text() == "20 of 20 reference answers get the full reward"


def test_failing_ids_are_told():
    problems = [problem("good", "4"), problem("odd", "four"), problem("none", None)]
    check = check_answers(problems, lambda p, text: float(text.isdigit()))
    assert not check.ok
    assert (check.checked, check.without_answer) == (2, 1)
    assert [(w.id, w.got) for w in check.failed] == [("odd", "scores 0.0 instead of 1.0")]
    assert "(1 problems have no answer)" in check.text()
    assert "odd: answer 'four' scores 0.0" in check.text()


def test_of_a_worked_solution_the_final_answer_is_scored():
    problems = [problem("worked", "3 + 1 = 4\n#### 4")]
    seen = []
    check_answers(
        problems, lambda p, text: seen.append(text) or 1.0, answer_template="\\boxed{{answer}}"
    )
    assert seen == ["\\boxed{4}"]


def test_scores_count_by_their_task_metric():
    def score(problem, text):
        if text == "crash":
            raise RuntimeError("boom")
        error = Failure(kind="timeout", fault="grader", text="10 s")
        if text == "slow":
            return Score(total=None, task=None, error=error)
        return Score(total=0.3, task=2.0)

    problems = [problem("a", "fine"), problem("b", "slow"), problem("c", "crash")]
    check = check_answers(problems, score, maximum=2.0)
    assert {w.id: w.got for w in check.failed} == {
        "b": "is not scored (timeout: 10 s)",
        "c": "fails with RuntimeError('boom')",
    }
    assert [w.id for w in check_answers(problems[:1], score).failed] == ["a"]


@pytest.mark.parametrize("value", [None, float("nan"), 1.1, 0.999])
def test_anything_but_the_maximum_fails(value):
    assert not check_answers([problem("a", "4")], lambda p, text: value).ok


def test_sample_is_seeded_and_bounded():
    problems = [problem(f"p{i}", "4") for i in range(50)]

    def failing(seed):
        found = check_answers(problems, lambda p, text: 0.0, sample=12, seed=seed).failed
        return {w.id for w in found}

    assert len(failing(0)) == 12
    assert failing(0) == failing(0) != failing(1)
    text = check_answers(problems, lambda p, text: 0.0, sample=12).text()
    assert text.endswith("... and 2 more")
    assert len(text.splitlines()) == 12


def test_template_needs_the_answer():
    with pytest.raises(ValueError, match=r"answer_template: 'x' has no \{answer\}"):
        check_answers([problem("a", "4")], in_tags, answer_template="x")
    with pytest.raises(ValueError, match="sample: 0 must be at least 1"):
        check_answers([problem("a", "4")], in_tags, sample=0)


def test_braces_in_the_template_are_literal():
    seen = []
    check_answers(
        [problem("a", "4")],
        lambda p, text: seen.append(text),
        answer_template=r"\boxed{{answer}} {x}",
    )
    assert seen == [r"\boxed{4} {x}"]
