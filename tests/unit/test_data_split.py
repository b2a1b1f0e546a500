"""The held-out split, and the longest prompt allowed."""

import re

import pytest

from gruppo.data import Jsonl, split
from gruppo.data.split import fitting, partition
from gruppo.types import Message, Problem


def problem(name, text=None, **info):
    prompt = (Message("user", name if text is None else text),)
    return Problem(id=name, prompt=prompt, answer="1", info=info, source="s")


def ids(problems):
    return {p.id for p in problems}


def test_split_is_a_partition_of_different_problems():
    problems = [problem(f"p{i}") for i in range(200)]
    train, held_out = split(problems, 50)
    assert (len(train), len(held_out)) == (150, 50)
    assert ids(train) | ids(held_out) == ids(problems)
    order = [p.id for p in problems]
    assert [p.id for p in train] == [name for name in order if name in ids(train)]


def test_split_depends_on_ids_and_seed_alone():
    problems = [problem(f"p{i}") for i in range(100)]
    held_out = ids(split(problems, 20)[1])
    assert ids(split(problems[::-1], 20)[1]) == held_out
    reworded = [problem(p.id, "other words " + p.id) for p in problems]
    assert ids(split(reworded, 20)[1]) == held_out
    other = ids(split(problems, 20, seed=1)[1])
    assert len(other & held_out) < 12


def test_new_rows_displace_few():
    problems = [problem(f"p{i}") for i in range(1000)]
    before = ids(split(problems, 100)[1])
    added = [problem(f"new{i}") for i in range(100)]
    after = ids(split(problems + added, 100)[1])
    # a new row is held out with probability 1/11: 9 expected, and as many old ones leave
    assert len(before - after) == len(after & ids(added))
    assert len(before - after) <= 22


def test_equal_prompts_never_straddle():
    problems = [problem(f"p{i}", f"text {i % 30}") for i in range(120)]
    train, held_out = split(problems, 10)
    assert len(held_out) == 10
    assert {p.prompt for p in train} & {p.prompt for p in held_out} == set()
    # 15 % of 30 texts are 5: two problems of each; their other copies are in neither part
    assert len({p.prompt for p in held_out}) == 5
    assert len(train) == 100


def test_keys_never_straddle_and_are_spread():
    problems = [problem(f"p{i}", split_key=f"k{i % 20}") for i in range(400)]
    train, held_out = split(problems, 9)
    assert len(held_out) == 9
    assert {p.info["split_key"] for p in held_out} & {p.info["split_key"] for p in train} == set()
    # 15 % of 20 keys are 3, each gives 3 problems
    assert sorted(
        [p.info["split_key"] for p in held_out].count(key)
        for key in {p.info["split_key"] for p in held_out}
    ) == [3, 3, 3]
    assert len(train) == 340


def test_one_held_out_key_of_several_is_enough():
    problems = [problem(f"p{i}", split_key=[f"a{i % 5}", f"b{i % 7}"]) for i in range(70)]
    train, held_out = split(problems, 10)
    trained = {key for p in train for key in p.info["split_key"]}
    assert all(set(p.info["split_key"]) - trained for p in held_out)


@pytest.mark.parametrize("held_out", [-1, 3, 4])
def test_impossible_numbers(held_out):
    problems = [problem(f"p{i}") for i in range(3)]
    with pytest.raises(ValueError, match=rf"held_out: {held_out} of 3 .* choose 0 to 2"):
        split(problems, held_out)


def test_nothing_left_to_train_on():
    with pytest.raises(ValueError, match="equal prompts and equal split keys stay together"):
        split([problem(f"p{i}", "same") for i in range(5)], 2)


def test_zero_held_out():
    problems = [problem(f"p{i}") for i in range(3)]
    assert split(problems, 0) == (problems, [])


def test_streamed_data_split_like_a_list(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"question": "q{i % 40}", "answer": "{i}"}}\n' for i in range(60)))
    loaded = split(Jsonl(path=str(path)).load(), 12, seed=5)
    streamed = split(Jsonl(path=str(path), streaming=True).load(), 12, seed=5)
    assert [list(part) for part in streamed] == [list(part) for part in loaded]
    assert streamed[0][3] == loaded[0][3]
    kept = fitting(streamed[0], lambda messages: messages[0].content, 2)
    assert [streamed[0][row].prompt[0].content for row in kept] == [
        p.prompt[0].content for p in loaded[0] if len(p.prompt[0].content) == 2
    ]


def words(messages):
    return [0] * sum(len(message.content.split()) for message in messages)


def test_positions_of_the_prompts_that_fit():
    problems = [problem(f"p{i}", " ".join("w" * (i + 1))) for i in range(6)]
    assert list(fitting(problems, words, 4)) == [0, 1, 2, 3]
    assert list(fitting(problems, words, 6, policy="error")) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("limit", "policy", "text"),
    [
        (4, "error", "problem 'p4' of s has 5 prompt tokens, the limit is 4"),
        (0, "drop", "max_prompt_tokens: 0 must be at least 1"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(limit, policy, text):
    problems = [problem(f"p{i}", " ".join("w" * (i + 1))) for i in range(6)]
    with pytest.raises(ValueError, match=re.escape(text)):
        fitting(problems, words, limit, policy=policy)


def test_none_fits():
    with pytest.raises(ValueError, match=r"none of 1 .* \(the shortest has 3\)"):
        fitting([problem("p", "a b c")], words, 2)


def test_positions_of_the_split():
    problems = [problem(f"p{i}") for i in range(10)]
    train, test = partition(problems, 4)
    assert sorted([*train, *test]) == list(range(10))
