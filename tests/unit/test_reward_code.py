"""The code reward: which program is taken, three forms of tests, whose fault a failure is."""

import json

import pytest

from gruppo.data import tasks
from gruppo.recipe import load
from gruppo.recipe.build import open_rewards
from gruppo.reward import Code, Part, RewardSet
from gruppo.reward.code_run import Trial, WrongTests, run
from gruppo.reward.code_tests import read_suite
from gruppo.sandbox import Box, NoSandbox, Sandbox, SandboxFailure
from gruppo.types import Completion, Problem, Score
from support.boxes import linux

pytestmark = linux
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


def test_what_a_program_prints_is_not_taken_for_it(reward: Code) -> None:
    """Nor a test, a command or data behind it."""
    problem = Problem(id="p", prompt=(), info={"tests": ADD})
    right = block("def add(a, b): return a + b")
    shown = ["```text\n3\n```", "```\n3\n```", '```json\n{"a": 1}\n```', "```bash\npython x\n```"]
    assert reward(problem, [row(f"{right}{text}") for text in shown]) == [1.0] * 4
    [alone] = reward(problem, [row(shown[3])])
    assert alone.error.kind == "no_program"


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
        ({"stdin": [{"input": "1", "output": "\ud800"}]}, "gold_unreadable"),
        ({"asserts": ["assert ("]}, "gold_unreadable"),
        ({"asserts": ["assert 1 == 2"]}, "tests_wrong"),
        ({"asserts": ["import os; os._exit(0)"]}, "tests_wrong"),
        ({"asserts": ["assert f()"], "stdin": []}, "gold_unreadable"),
    ],
)
def test_wrong_tests_are_the_graders_fault(reward: Code, tests: object, why: str) -> None:
    assert graded(reward, tests, "def f(): return 1") == [("grader", why)]


def test_what_comes_of_a_call_is_the_programs_fault(reward: Code) -> None:
    """Test code has one box: what a program put into it must not make the row unscored."""
    ends = {"asserts": ["f(0)", "import os\nos._exit(0)", "f(0)"]}
    values = graded(reward, ends, "def f(n): return 1", "def f(n): return 1 / 0")
    assert values == [1 / 3, ("completion", "tests")]
    fails = {"asserts": ["f(0)", "assert 1 == 2", "f(0)"]}  # for lack of memory, say
    assert graded(reward, fails, "def f(n): return 1") == [2 / 3]
    # as an argument, the deepest value that can be sent is too deep
    again = {"asserts": ["f(f(0))"]}
    deep = "def f(n):\n    x = 1\n    for _ in range({depth}): x = [x]\n    return 1 if n else x"
    sources = [deep.format(depth=depth) for depth in (60, 63, 64, 65)]
    lost = [("completion", "tests"), ("completion", "ValueError")]
    assert graded(reward, again, *sources) == [1.0, 1.0, *lost]


def test_an_error_that_ends_loops_is_no_way_through_test_code(reward: Code) -> None:
    tests = {"asserts": ["assert all(map(even, [2, 4]))", "for x in map(even, [1]): assert not x"]}
    values = graded(
        reward,
        tests,
        "def even(n): return n % 2 == 0",
        "def even(n): raise StopIteration",
        "def even(n): raise StopAsyncIteration",
    )
    kinds = ["StopIteration", "StopAsyncIteration"]
    assert values == [1.0, *(("completion", kind) for kind in kinds)]


def test_one_rows_odd_failure_is_its_own() -> None:
    trial = Trial(source="", suite=read_suite(ADD), fast=False)

    def run_into(error: Exception) -> object:
        def fresh() -> Box:
            raise error

        return run(fresh, trial)

    result = run_into(KeyError("odd"))
    assert (type(result), str(result)) == (WrongTests, "KeyError: 'odd'")
    for error, known in (
        (SandboxFailure("x"), SandboxFailure),
        (NoSandbox("x"), NoSandbox),
        (OSError(24, "none left"), SandboxFailure),
    ):
        with pytest.raises(known):
            run_into(error)


def test_a_script_that_runs_out_of_time_is_not_run_again(reward: Code) -> None:
    cases = [{"input": f"{n}\n", "output": "1\n"} for n in (1, 0, 1, 1)]
    loops = "if input() == '0':\n    while True: pass\nprint(1)"
    floods = "if input() == '0': print('x' * (3 << 20))\nprint(1)"
    crashes = "if input() == '0': raise SystemExit(3)\nprint(1)"
    assert graded(reward, {"stdin": cases}, loops, floods, crashes) == [0.25, 0.25, 0.75]


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
    assert len(cases) == 6
    assert cases[0] == {"args": [[9, 0, 0, 11, 10, -3]], "expected": [2, 2, 12]}
    assert cases[4] == {"args": [[-3, -5]], "expected": []}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_code_tasks_do_not_pay_for_repeating_the_example(steps: int) -> None:
    """What a program earns that returns the shown value, and nothing of an empty list."""
    every, share = 0, 0.0
    for index in range(400):
        item = tasks.CodeTasks(steps=steps)(seed=2, index=index)
        example = item.question.rpartition(" returns ")[2].removesuffix(".")
        cases = json.loads(item.info["tests"])["cases"]
        assert f"({cases[0]['args'][0]}) returns" not in item.question
        right = [
            case["expected"] in ([], 0)
            if case["args"] == [[]]
            else str(case["expected"]) == example
            for case in cases
        ]
        every += all(right)
        share += sum(right) / len(right)
    assert every / 400 < 0.15  # score = "all", as in the recipe
    assert share / 400 < 0.35


def test_constants_earn_little_of_number_tasks() -> None:
    """The recipe pays for the share of cases: what the best constant of each problem would get."""
    sources = load("code_tasks").data.train
    assert [source.options["of"] for source in sources] == ["number", "number"]
    best = []
    for steps in (1, 2):
        for index in range(400):
            item = tasks.CodeTasks(steps=steps, of="number", shown=0)(seed=2, index=index)
            values = [case["expected"] for case in json.loads(item.info["tests"])["cases"]]
            best.append(max(map(values.count, values)) / len(values))
    assert max(best) < 1
    assert sum(best) / len(best) < 0.2  # 1 of 6 is the least


def test_number_tasks_are_right_by_hand() -> None:
    item = tasks.CodeTasks(steps=2, of="number")(seed=0, index=1)
    assert item.question == (
        "Write a Python function apply_steps(x) of a whole number: take 2 minus the number, then "
        "change its sign, and return how far it is from 0.\n"
        "Example: apply_steps(35) returns 33."
    )
    assert item.answer == ("def apply_steps(x):\n    x = 2 - x\n    x = -x\n    return abs(x)")
    assert item.keys == ("from negate distance",)
    cases = json.loads(item.info["tests"])["cases"]
    assert cases[0] == {"args": [-6], "expected": 8}
    with pytest.raises(ValueError, match="of: 'text' is unknown; use some of list, number"):
        tasks.CodeTasks(of="text")


def test_code_tasks_answers_pass_their_own_tests(reward: Code) -> None:
    items = [
        tasks.CodeTasks(steps=n % 3 + 1, of=of)(seed=1, index=n)
        for n in range(6)
        for of in ("list", "number")
    ]
    groups = [
        (Problem(id=str(n), prompt=(), info=item.info), [row(block(item.answer))])
        for n, item in enumerate(items)
    ]
    assert reward.score_batch(groups) == [[1.0]] * 12
