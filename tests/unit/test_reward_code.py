"""The code reward: which program is taken, three forms of tests, whose fault a failure is."""

import json
import sys
from pathlib import Path

import pytest

from gruppo.data import tasks
from gruppo.recipe import load
from gruppo.recipe.build import open_rewards
from gruppo.recipe.session import start
from gruppo.reward import Code, Part, RewardSet
from gruppo.reward.code import last_block
from gruppo.reward.code_tests import read_suite
from gruppo.sandbox import Sandbox
from gruppo.train import train
from gruppo.types import Completion, Problem, Score

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="boxes need Linux")
BOX = Sandbox(kind="lite", cpu_s=1, wall_s=3.0, memory_mib=256)

ADD = {
    "function": "add",
    "cases": [{"args": [1, 2], "expected": 3}, {"args": [2], "kwargs": {"b": 2}, "expected": 4}],
}
SQUARE = {"stdin": [{"input": "3\n", "output": "9\n"}, {"input": "-4", "output": "16"}]}
ASSERTS = {
    "setup": "import math",
    "asserts": [
        "assert add(1, 2) == 3",
        "assert math.isclose(add(0.1, 0.2), 0.3)",
        "try:\n    add('a', 1)\nexcept TypeError:\n    pass\nelse:\n    raise AssertionError",
    ],
}


@pytest.fixture(scope="module")
def reward():
    code = Code(sandbox=BOX)
    yield code
    code.close()


def row(text: str) -> Completion:
    return Completion(tokens=(), logp=(), mask=(), version=(), text=text, finish="stop")


def block(source: str) -> str:
    return f"So:\n```python\n{source}\n```\n"


def graded(reward: Code, tests: object, *sources: str) -> list:
    """Values; failures as (fault, kind)."""
    problem = Problem(id="p", prompt=(), info={"tests": tests})
    values = reward(problem, [row(block(source)) for source in sources])
    return [(v.error.fault, v.error.kind) if isinstance(v, Score) else v for v in values]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```\na\n```\n```python\nb\n```\nend", "b\n"),
        ("  ```py\na\n  ```", "a\n"),
        ("```python\na", None),
        ("a = 1", None),
        ("```a``` is code", None),
        ("```python\n```", ""),
        ("```\na\n```\n```\nb", "a\n"),
    ],
)
def test_the_last_closed_block_is_the_program(text: str, found: str | None) -> None:
    assert last_block(text) == found


def test_a_program_in_the_thinking_does_not_count(reward: Code) -> None:
    problem = Problem(id="p", prompt=(), info={"tests": ADD})
    right = block("def add(a, b): return a + b")
    texts = [f"<think>{right}</think>none", f"<think>none</think>{right}", f"<think>{right}", "no"]
    values = reward(problem, [row(text) for text in texts])
    kinds = [v.error.kind if isinstance(v, Score) else v for v in values]
    assert kinds == ["no_program", 1.0, "no_program", "no_program"]


def test_function_cases(reward: Code) -> None:
    values = graded(
        reward,
        json.dumps(ADD),
        "def add(a, b): return a + b",
        "def add(a, b): return 3",
        "def add(a, b): return float(a + b)",
        "def add(a, b): return a + b if a == 1 else 1 / 0",
        "def add(a): return a",
        "def sub(a, b): return a + b",
    )
    wrong = [("completion", "TypeError"), ("completion", "KeyError")]
    assert values == [1.0, 0.5, 0.0, 0.5, *wrong]


def test_standard_input_cases(reward: Code) -> None:
    values = graded(
        reward,
        SQUARE,
        "print(int(input()) ** 2)",
        "import sys\nsys.stdout.write('9  \\n\\n')",
        "print(9)\nraise SystemExit(2)",
        "print('9' * 10)",
    )
    assert values == [1.0, 0.5, ("completion", "exit_2"), 0.0]


def test_assertions_call_the_program_in_another_box(reward: Code) -> None:
    values = graded(
        reward,
        ASSERTS,
        "def add(a, b): return a + b",
        "def add(a, b): return int(a) + int(b)",
        "class Yes:\n    def __eq__(self, other): return True\ndef add(a, b): return Yes()",
        "import os\ndef add(a, b): os._exit(0)",
    )
    assert values[:2] == [1.0, 1 / 3]
    assert values[2:] == [("completion", "ValueError"), ("completion", "exit_0")]


def test_all_or_nothing() -> None:
    code = Code(sandbox=BOX, score="all")
    values = graded(code, ADD, "def add(a, b): return a + b", "def add(a, b): return 3")
    code.close()
    assert values == [1.0, 0.0]


def test_limits_are_the_programs_fault(reward: Code) -> None:
    values = graded(
        reward,
        ADD,
        "def add(a, b):\n    while True: pass",
        "def add(a, b): return bytearray(1 << 40)",
        "def add(a, b): return 'x' * (3 << 20)",
        "def add(a, b): print('x' * (3 << 20)); return a + b",
        "import ctypes\nctypes.string_at(0)",
    )
    kinds = ["timeout", "MemoryError", "oversize", "oversize", "crash"]
    assert values == [("completion", kind) for kind in kinds]


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        ("not json", "gold_unreadable"),
        ({"function": "f", "cases": []}, "gold_unreadable"),
        ({"function": "f", "cases": [{"args": 3, "expected": 1}]}, "gold_unreadable"),
        ({"function": "f x", "cases": [{"args": [], "expected": 1}]}, "gold_unreadable"),
        ({"stdin": [{"input": "1"}]}, "gold_unreadable"),
        ({"asserts": ["assert ("]}, "gold_unreadable"),
        ({"asserts": ["assert 1 == 2"]}, "tests_wrong"),
        ({"asserts": ["import os; os._exit(0)"]}, "tests_wrong"),
        ({"asserts": ["assert f()"], "stdin": []}, "gold_unreadable"),
    ],
)
def test_wrong_tests_are_the_graders_fault(reward: Code, tests: object, why: str) -> None:
    assert graded(reward, tests, "def f(): return 1") == [("grader", why)]


def test_a_problem_without_tests_is_the_graders_fault(reward: Code) -> None:
    value = reward(Problem(id="p", prompt=()), [row(block("x = 1"))])[0]
    assert isinstance(value, Score)
    assert (value.error.fault, value.error.kind) == ("grader", "gold_missing")


def test_a_sandbox_that_fails_leaves_the_row_unscored() -> None:
    broken = Code(sandbox=Sandbox(kind="unsafe-none", python="/nowhere/python"))
    rewards = RewardSet((Part(name="tests", reward=broken, minimum=-1.0),))
    problem = Problem(id="p", prompt=(), info={"tests": ADD})
    score = rewards.score(problem, [row(block("def add(a, b): return a + b"))])[0]
    rewards.close()
    assert score.total is None
    assert score.error.fault == "grader"


def test_a_failing_program_gets_the_parts_minimum(reward: Code) -> None:
    rewards = RewardSet((Part(name="tests", reward=reward, minimum=-1.0),))
    problem = Problem(id="p", prompt=(), info={"tests": ADD})
    rows = [row(block("def add(a, b): return 0")), row(block("def add(")), row("nothing")]
    assert [s.total for s in rewards.score(problem, rows)] == [0.0, -1.0, -1.0]


def test_tuples_and_sets_can_be_expected(reward: Code) -> None:
    cases = [
        {"args": [], "expected": {"$tuple": [1, 2]}},
        {"args": [], "expected": [1, 2]},
        {"args": [], "expected": {"$set": [2, 1]}},
    ]
    values = graded(
        reward,
        {"function": "f", "cases": cases},
        "def f(): return (1, 2)",
        "def f(): return [1, 2]",
        "def f(): return {1, 2}",
        "def f(): return None",
    )
    assert values == [1 / 3, 1 / 3, 1 / 3, 0.0]


def test_large_numbers_have_one_form() -> None:
    suite = read_suite({"function": "f", "cases": [{"args": [2**70], "expected": {"$int": "0x3"}}]})
    call, expected = suite.cases[0]
    assert call.args == ({"$int": hex(2**70)},)
    assert expected == 3


def test_a_recipe_without_a_box_says_so() -> None:
    settings = ['reward.parts.0.sandbox={kind = "unsafe-none"}']
    told: list[str] = []
    open_rewards(load("code_tasks", settings), told.append).close()
    assert told == ["reward tests: programs run with NO SANDBOX, with all rights of this process"]


def test_code_tasks_are_right_by_hand() -> None:
    item = tasks.CodeTasks(steps=2)(seed=0, index=0)
    assert item.question.startswith(
        "Write a Python function compute(x) of a list of whole numbers: increase every number by "
        "2, then drop every odd number, and return the resulting list."
    )
    assert item.keys == ("add even list",)
    cases = json.loads(item.info["tests"])["cases"]
    assert cases[0] == {"args": [[]], "expected": []}
    assert cases[1] == {"args": [[12, 9, 0, 7, 9]], "expected": [14, 2]}


def test_code_tasks_answers_pass_their_own_tests(reward: Code) -> None:
    items = [tasks.CodeTasks(steps=n % 3 + 1)(seed=1, index=n) for n in range(12)]
    groups = [
        (Problem(id=str(n), prompt=(), info=item.info), [row(block(item.answer))])
        for n, item in enumerate(items)
    ]
    assert reward.score_batch(groups) == [[1.0]] * 12


@pytest.mark.slow
def test_the_recipe_trains_a_step(tiny_folder: Path, tmp_path: Path) -> None:
    settings = [
        f"model.name={tiny_folder}",
        "data.train.0.size=100",
        "data.train.1.size=100",
        "data.train.0.prompting={}",
        "data.train.1.prompting={}",
        "data.held_out=4",
        "rollout.prompts_per_step=2",
        "rollout.group_size=2",
        "rollout.max_tokens=8",
        "train.steps=1",
        "reward.parts.0.sandbox={kind = 'lite'}",
    ]
    told: list[str] = []
    with start(load("code_tasks", settings), tmp_path / "run", told.append) as session:
        outcome = train(session.run, session.state)
    assert outcome.state.step == 1
    assert any("programs run in the lite box" in line for line in told)
    meta = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "programs run in the lite box" in json.dumps(meta)
