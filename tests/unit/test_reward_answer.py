"""Extraction, exact numbers, strings, patterns and the exact path of the math reward."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gruppo.reward.answer import Exact, Number
from gruppo.reward.extract import find_answer, last_boxed, one_number, to_fraction
from gruppo.reward.math_answer import Math, reference
from gruppo.reward.math_text import compare_exactly, tidy
from gruppo.reward.regex import Regex
from gruppo.types import Completion, Problem, Score


def row(text: str) -> Completion:
    return Completion(tokens=(), logp=(), mask=(), version=(), text=text, finish="stop")


def grade(reward, gold: str | None, *texts: str) -> list:
    """Values; a failure as "fault/kind"."""
    values = reward(Problem(id="p", prompt=(), answer=gold), [row(t) for t in texts])
    return [f"{v.error.fault}/{v.error.kind}" if isinstance(v, Score) else v for v in values]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", Fraction(7)),
        ("-7.50", Fraction(-15, 2)),
        ("−3", Fraction(-3)),
        ("1,234,567.8", Fraction(12345678, 10)),
        (r"1{,}000", Fraction(1000)),
        (r"\$5", Fraction(5)),
        ("$5$", Fraction(5)),
        ("12.", Fraction(12)),
        (".5", Fraction(1, 2)),
        ("6e3", Fraction(6000)),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac34", Fraction(-3, 4)),
        ("12,34", None),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("1e999999999", None),
        ("1" * 500, None),
        ("e5", None),
        ("-", None),
        ("", None),
        ("12:30", None),
        ("0x10", None),
        ("nan", None),
        ("²", None),
    ],
)
def test_to_fraction(text: str, value: Fraction | None) -> None:
    assert to_fraction(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72 apples", Fraction(72)),
        ("about $-3.5 each", Fraction(-7, 2)),
        ("x = 5", Fraction(5)),
        ("50%", Fraction(50)),
        ("3 or 4", None),
        ("3^2", None),
        ("x2 = 5", None),
        ("5 10^3", None),
        ("none", None),
    ],
)
def test_one_number_refuses_everything_but_one_number(text: str, value: Fraction | None) -> None:
    assert one_number(text) == value


def test_find_answer_reads_one_place_after_the_thinking() -> None:
    assert find_answer("<think> 3 </think> so 4, no 5-6", "last").text == "6"
    assert find_answer("so 5 <think> 3", "last").problem == "no_answer"
    assert find_answer("#### 1\n#### $18 \nthanks 3", "hashes").text == "$18"
    assert find_answer("<answer> 4 </answer>", "answer_tag").text == "4"
    assert find_answer("<answer>4</answer><answer>5</answer>", "answer_tag").problem == (
        "many_answers"
    )
    assert find_answer("</answer>4<answer>", "answer_tag").problem == "no_answer"
    assert find_answer("<answer>4", "answer_tag").problem == "no_answer"
    assert find_answer(r"\boxed{1} \boxed{2}", "boxed").text == "2"
    assert find_answer(r"\boxed{" + "1" * 2001 + "}", "boxed").problem == "oversize"


def test_last_boxed_needs_balanced_braces() -> None:
    assert last_boxed(r"\boxed{a_{1}} then \fbox{x}") == "a_{1}"
    assert last_boxed(r"\boxed{a_{1}") is None
    assert last_boxed("nothing") is None


def test_number_grades_each_place() -> None:
    assert grade(Number(), "#### 1,200", "it is $1200.00.", "1201", "no idea") == [
        1.0,
        0.0,
        "completion/no_answer",
    ]
    tag = Number(where="answer_tag")
    assert grade(tag, "0.5", "<answer>1/2</answer>", "1/2", "<answer>1/2 or 3</answer>") == [
        1.0,
        "completion/no_answer",
        "completion/unreadable",
    ]
    assert grade(Number(where="boxed"), "-4", r"4 \boxed{-4}") == [1.0]
    assert grade(Number(), "1/3", "0.33") == [0.0]


def test_number_without_a_usable_reference_is_the_graders_failure() -> None:
    assert grade(Number(), None, "3", "4") == ["grader/gold_missing"] * 2
    assert grade(Number(), "three", "3") == ["grader/gold_unreadable"]


def test_exact_collapses_white_space_and_folds_case_when_asked() -> None:
    assert grade(Exact(), "New  York", " New York\n", "new york") == [1.0, 0.0]
    assert grade(Exact(ignore_case=True), "New York", "NEW YORK") == [1.0]
    assert grade(Exact(where="answer_tag"), "a", "<answer>a</answer>", "a") == [
        1.0,
        "completion/no_answer",
    ]
    assert grade(Exact(), "", "x") == ["grader/gold_unreadable"]


def test_regex_takes_the_answer_literally() -> None:
    assert grade(Regex(pattern=r"= {answer}$"), "1.5", "x = 1.5", "x = 1x5") == [1.0, 0.0]
    assert grade(Regex(pattern="A+", full=True, ignore_case=True), None, "aAa", "aab") == [1.0, 0.0]
    assert grade(Regex(pattern="a.b"), None, "xa\nb", "a\ud800b") == [1.0, 1.0]
    assert grade(Regex(pattern="is {answer}"), None, "is 3") == ["grader/gold_missing"]
    with pytest.raises(ValueError, match="regex reward: pattern"):
        Regex(pattern="(")


@pytest.mark.parametrize(
    ("gold", "given", "value"),
    [
        ("50%", "0.5", 1.0),
        (r"50\%", "50", 1.0),
        ("50%", "5", 0.0),
        (r"5\text{ cm}", "5", 1.0),
        ("90", r"90^\circ", 1.0),
        ("0.333333", "1/3", 1.0),
        ("0.33333", "1/3", 0.0),
        ("1000000", "1000001", 0.0),
        ("B", "(b)", 1.0),
        ("B", "(A) or (B)", 0.0),
        ("A", "A) or B)", 0.0),
        ("Evelyn", r"\text{evelyn}", 1.0),
        ("Evelyn", "Carla", 0.0),
        ("12:05", "12:5", 0.0),
        ("9:30", r"09:30", 1.0),
        (r"\dfrac12", r"\frac 12", 1.0),
        (r"1,2,\ldots,10", r"1, 2, \ldots, 10", 1.0),
    ],
)
def test_exact_path_of_the_math_reward(gold: str, given: str, value: float) -> None:
    assert compare_exactly(gold, given) == value


def test_the_exact_path_starts_no_worker() -> None:
    reward = Math(cpu_s=0.987)  # settings of its own: a pool that no other test has used
    assert grade(reward, "72", r"maybe 72", r"\boxed{72}", r"\boxed{73}") == [
        "completion/no_answer",
        1.0,
        0.0,
    ]
    assert reward._pool().pids() == []


def test_math_reads_the_reference_of_a_worked_solution() -> None:
    assert reference(Problem(id="a", prompt=(), answer=r"so \boxed{$x^2$}.")) == "x^2"
    assert reference(Problem(id="a", prompt=(), answer="5+5\n#### 10")) == "10"
    assert grade(Math(), None, r"\boxed{1}") == ["grader/gold_missing"]


def test_math_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"math\.cpu_s = 0"):
        Math(cpu_s=0)


PIECES = st.sampled_from(
    ["<answer>", "</answer>", "</think>", "<think>", r"\boxed{", "}", "####", "1", "-", ".", ",",
     "e", "9" * 30, "/", r"\frac", "{", "%", "$", r"\text{", " ", "\n", "\x00", "٣", "½", "a"]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join)


@given(TEXTS, TEXTS)
def test_no_text_makes_a_grader_raise_or_give_anything_but_0_or_1(gold: str, text: str) -> None:
    for where in ("last", "answer_tag", "boxed", "hashes"):
        for reward in (Number(where=where), Exact(where=where)):
            assert set(grade(reward, gold, text)) <= {0.0, 1.0} | {
                f"{fault}/{kind}"
                for fault, kind in (
                    ("grader", "gold_unreadable"),
                    ("completion", "no_answer"),
                    ("completion", "many_answers"),
                    ("completion", "unreadable"),
                )
            }
    verdict = compare_exactly(tidy(gold), tidy(text))
    assert isinstance(verdict, Score) or verdict in (0.0, 1.0, None)
    assert compare_exactly(tidy(gold), tidy(gold)) == 1.0


@pytest.mark.parametrize(
    "text",
    ["1" * 200_000, "1 " * 100_000, "1," * 100_000, "1" + " " * 200_000 + "/", "-." * 100_000,
     r"\boxed{" * 30_000, "####" * 50_000, "1/" * 100_000, "<answer>" * 30_000],
)  # fmt: skip
def test_long_texts_take_linear_time(text: str) -> None:
    started = time.process_time()
    for where in ("last", "answer_tag", "boxed", "hashes"):
        grade(Number(where=where), "7", text)
    assert time.process_time() - started < 1.0
