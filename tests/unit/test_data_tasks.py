"""Own tasks: answers recomputed from the sentences, canonical keys, grammar, determinism."""

import re
from collections import Counter

import pytest

from gruppo.data import TASKS, TaskSource, WordProblems, split
from gruppo.data.tasks import Arithmetic, Comparison, Countdown, LastWord, Letters, ReverseWords
from gruppo.data.tasks.forms import CHANGES, ENDINGS, ONE_STEP, OPENINGS
from gruppo.data.tasks.vocabulary import PEOPLE, THINGS, WORDS


def numbers(text):
    return [int(digits) for digits in re.findall(r"\d+", text)]


# What each kind asks for, from the two numbers in the sentence alone, in whatever order.
FROM_TEXT = {
    "add": lambda x, y: x + y,
    "combine": lambda x, y: x + y,
    "subtract": lambda x, y: abs(x - y),
    "compare": lambda x, y: abs(x - y),
    "multiply": lambda x, y: x * y,
    "price": lambda x, y: x * y,
    "divide": lambda x, y: max(x, y) / min(x, y),
    "group": lambda x, y: max(x, y) / min(x, y),
}


@pytest.fixture(scope="module")
def items():
    task = WordProblems()
    return [task(0, index) for index in range(2000)]


def test_one_step_answers_follow_from_the_sentence(items):
    for item in items:
        x, y = numbers(item.question)
        assert FROM_TEXT[item.info["operation"]](x, y) == int(item.answer), item.question
        assert 2 <= min(x, y) <= 12
        assert int(item.answer) > 0


def test_operations_are_drawn_evenly(items):
    counts = Counter(item.info["operation"] for item in items)
    assert set(counts) == set(ONE_STEP)
    # 2000 / 8 = 250 each, standard deviation 14.8: five of them
    assert all(abs(count - 250) < 74 for count in counts.values())


def test_there_are_308_keys(items):
    numbers_drawn = range(2, 13)
    possible = (
        {f"+ {a} {b}" for a in numbers_drawn for b in numbers_drawn if a <= b}
        | {f"* {a} {b}" for a in numbers_drawn for b in numbers_drawn if a <= b}
        | {f"- {a} {b}" for a in numbers_drawn for b in numbers_drawn if a > b}
        | {f"/ {a * b} {b}" for a in numbers_drawn for b in numbers_drawn}
    )
    assert len(possible) == 66 + 66 + 55 + 121 == 308
    seen = {key for item in items for key in item.keys}
    assert seen <= possible
    # a sum is drawn with probability >= 1/484, so 2000 problems miss 1.6 % of the keys or fewer
    assert len(seen) >= 295


def test_grammar(items):
    two = WordProblems(steps=2)
    for item in [*items, *(two(1, index) for index in range(500))]:
        text = item.question
        assert re.search(r"\b1 [a-z]", text) is None, text
        assert re.search(r"\b[Aa] [aeiou]", text) is None, text
        assert re.search(r"[{}]|  | [.?,]|\.\.", text) is None, text
        assert re.search(r"(\b\w+\b) \1\b", text) is None, text
        assert re.fullmatch(r"[A-Z0-9].*\?", text), text
        assert all(s[0].isupper() or s[0].isdigit() for s in re.split(r"(?<=[.?]) ", text)), text
        names = set(re.findall(r"\b[A-Z]\w+", text)) & {person.name for person in PEOPLE}
        assert len(names) <= 2, text


def test_number_and_noun_agree_for_every_noun():
    assert [thing.counted(1).split()[1] for thing in THINGS] == [thing.one for thing in THINGS]
    assert {thing.counted(2) for thing in THINGS if thing.one in ("leaf", "berry", "watch")} == {
        "2 leaves",
        "2 berries",
        "2 watches",
    }


def test_enough_variety(items):
    assert sum(len(forms) for _, forms in ONE_STEP.values()) == 43
    assert len({person.name for person in PEOPLE}) == len(PEOPLE) == 80
    assert len({thing.one for thing in THINGS}) == len(THINGS) == 58
    assert len(set(WORDS)) == len(WORDS)
    assert len({item.question for item in items}) > 1980


def test_every_form_is_used(items):
    """A form is recognised by its longest literal piece."""
    text = "\n".join(item.question for item in items)
    for _, forms in ONE_STEP.values():
        for form in forms:
            assert max(re.split(r"\{\w+\}", form), key=len) in text


def test_two_steps_follow_from_the_sentences():
    task = WordProblems(steps=2)
    shown = Counter()
    for index in range(600):
        item = task(0, index)
        (s1, a, b, r1), (s2, c, d, r2) = item.info["steps"]
        assert numbers(item.question) == [a, b, d], item.question
        assert c == r1 >= 2
        for symbol, x, y, r in ((s1, a, b, r1), (s2, c, d, r2)):
            assert {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[symbol] == r >= 1
        assert item.answer == str(r2)
        assert len(item.keys) == 2
        shown[s1 + s2] += 1
    assert set(shown) == {x + y for x in "+-*" for y in "+-*/"}


def test_two_step_forms_by_hand():
    """Read each clause once: its kind decides the arithmetic."""
    assert CHANGES["add"][0] == "+"
    assert CHANGES["subtract"][0] == "-"
    assert ENDINGS["divide"][0] == "/"
    assert ENDINGS["price"][0] == "*"
    assert all("in each" in form or "each." in form for form in OPENINGS["multiply"])
    text = WordProblems(steps=2)(0, 1)
    assert text.question == (
        "Henry collected 12 watches. He loses 2 of the watches. He loses 3 of the watches. How "
        "many watches does Henry have now?"
    )
    assert (text.answer, text.keys) == ("7", ("- 12 2", "- 10 3"))


def test_literal_problems_by_hand():
    """Pinned: another text under the same seed would change every recorded run."""
    task = WordProblems()
    assert [(task(0, i).question, task(0, i).answer) for i in (1, 14, 27)] == [
        ("Jacob has 12 eggs and Lily has 3 eggs. How many eggs do they have together?", "15"),
        ("Lucy wants to collect 10 bananas. She already has 2. How many more does she need?", "8"),
        ("George has 5 more pencils than David. David has 7 pencils. How many pencils does George "
         "have?", "12"),
    ]  # fmt: skip


def test_held_out_keys_are_not_in_training_in_any_form():
    problems = TaskSource(name="word_problems", size=1200).load()
    train, held_out = split(problems, 150, seed=3)
    assert len(held_out) == 150
    assert len({p.prompt for p in held_out}) == 150

    def facts(part):
        """(arithmetic, unordered numbers in the sentence): a mirror image has the same."""
        symbol = {family: symbol for family, (symbol, _) in ONE_STEP.items()}
        return {(symbol[p.info["operation"]], *sorted(numbers(p.prompt[-1].content))) for p in part}

    assert facts(train) & facts(held_out) == set()
    assert len(facts(held_out)) >= 44  # 15 % of the keys that were drawn
    assert len(facts(train)) + len(facts(held_out)) > 280


def test_held_out_steps_of_two_step_problems_are_not_in_training():
    problems = TaskSource(name="word_problems", size=500, options={"steps": 2}).load()
    train, held_out = split(problems, 80)
    assert len(held_out) == 80
    trained = {key for p in train for key in p.info["split_key"]}
    assert all(set(p.info["split_key"]) - trained for p in held_out)


def test_high_range_and_single_operation():
    task = WordProblems(operations=("subtract",), low=20, high=30)
    for index in range(300):
        x, y = numbers(task(5, index).question)
        assert 20 <= y < x <= 30


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"operations": ("minus",)}, "operations: 'minus' is unknown"),
        ({"operations": ()}, "operations: "),
        ({"operations": ("add", "add")}, "names one twice"),
        ({"operations": ("divide",), "steps": 2}, "cannot begin with a division"),
        ({"steps": 3}, "steps: 3 must be a whole number from 1 to 2"),
        ({"low": 1}, "low, high: 1, 12"),
        ({"low": 12, "high": 2}, "in order"),
    ],
)
def test_bad_settings_are_refused(settings, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        WordProblems(**settings)


def test_operations_that_cannot_follow_each_other_are_refused():
    task = WordProblems(operations=("subtract",), steps=2, low=2, high=3)
    with pytest.raises(ValueError, match="cannot follow each other with numbers from 2 to 3"):
        task(0, 0)


def test_arithmetic_answers_and_keys():
    task = Arithmetic(operations=("+", "-", "*", "/"), low=1, high=9)
    for index in range(300):
        item = task(2, index)
        assert eval(item.question) == int(item.answer) >= 0
        a, symbol, b = item.question.split()
        mirrored = sorted((int(a), int(b)), reverse=symbol in "-/")
        assert item.keys == (f"{symbol} {mirrored[0]} {mirrored[1]}",)


def test_comparison_is_uniform_over_different_numbers():
    task = Comparison(low=1, high=3)
    pairs = Counter(tuple(task(0, index).info["numbers"]) for index in range(600))
    assert set(pairs) == {(1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2)}
    # 100 each, standard deviation 9.1
    assert all(abs(count - 100) < 46 for count in pairs.values())
    assert task(0, 0).answer == str(max(task(0, 0).info["numbers"]))


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_countdown_solutions_use_each_number_once(count):
    task = Countdown(count=count, max_target=120)
    for index in range(100):
        item = task(0, index)
        assert eval(item.answer) == item.info["target"]
        assert 1 <= item.info["target"] <= 120
        assert sorted(numbers(item.answer)) == sorted(item.info["numbers"])
        assert set(re.sub(r"[\d ()]", "", item.answer)) <= set("+-*")


def test_word_tasks():
    for index in range(50):
        item = ReverseWords(count=4)(0, index)
        words = item.question.split(": ")[1].split(", ")
        assert len(set(words)) == 4
        assert item.answer == ", ".join(words[::-1])
        assert item.keys == (" ".join(sorted(words)),)
        last = LastWord()(0, index)
        listed = last.question[:-1].split(": ")[1].split(", ")
        assert 3 <= len(listed) <= 6
        assert last.answer == listed[-1]
        letter, text = re.findall(r'"(.*?)"', (count := Letters(count=2)(0, index)).question)
        assert count.answer == str(sum(character == letter for character in text))
        assert int(count.answer) >= 1


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_is_a_function_of_seed_and_index(name):
    first = TaskSource(name=name, size=50, seed=1).load()
    assert TaskSource(name=name, size=60, seed=1).load()[:50] == first
    assert TASKS[name]()(1, 49).question == first[49].prompt[0].content
    other = TaskSource(name=name, size=50, seed=2).load()
    assert sum(a.prompt == b.prompt for a, b in zip(first, other, strict=True)) <= 2
    assert [p.id for p in first[:2]] == [f"{name}/1/0", f"{name}/1/1"]
    assert first[0].source == name


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_can_hold_problems_out(name):
    train, held_out = split(TaskSource(name=name, size=200).load(), 20)
    assert len(held_out) == 20
    assert {p.prompt for p in train} & {p.prompt for p in held_out} == set()
    keys = [{key for p in part for key in p.info["split_key"]} for part in (train, held_out)]
    assert keys[0] & keys[1] == set()
