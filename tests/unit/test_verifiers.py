"""Task sets of the verifiers library: its own reward functions, run on our completions.

The slow tests need the library itself (extra ``verifiers``) and are skipped without it.
"""

import importlib.util
import sys
import textwrap
from dataclasses import replace

import pytest

from gruppo.data import Verifiers as Source
from gruppo.reward import Part, RewardSet
from gruppo.reward import Verifiers as Reward
from gruppo.types import Completion, Message

HEAD = "import verifiers.v1 as vf\n"
SUMS = """
class Data(vf.TaskData):
    answer: str


class Config(vf.TaskConfig):
    bonus: float = 0.0


class Task(vf.Task[Data, vf.State, Config]):
    @vf.reward
    async def right(self, task, trace) -> float:
        return float(trace.last_reply == task.answer) + self.config.bonus

    @vf.reward(weight=0.5)
    async def brief(self, trace) -> float:
        if trace.last_reply == "crash":
            raise RuntimeError("no brakes")
        return float(trace.num_output_tokens <= 2)

    @vf.reward(weight=0.25)
    async def asked(self, trace) -> float:
        return float([m.role for m in trace.messages] == ["system", "user", "assistant"])


class Settings(vf.TasksetConfig):
    task: Config = Config()
    first: int = 0


class Sums(vf.Taskset[Task, Settings]):
    def load(self):
        for n in range(self.config.first, self.config.first + 3):
            yield Task(Data(prompt=f"{n} + 2", answer=str(n + 2)), self.config.task)


__all__ = ["Sums"]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a task set as an importable module; returns its name."""
    if importlib.util.find_spec("verifiers") is None:
        pytest.skip("verifiers is not installed")
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(HEAD + textwrap.dedent(text))
        return name

    return write


def said(text, tokens=1):
    ids = tuple(range(tokens))
    return Completion(
        tokens=ids,
        logp=(-1.0,) * tokens,
        mask=(True,) * tokens,
        version=(0,) * tokens,
        text=text,
        finish="stop",
    )


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(ValueError, match=r'pip install "gruppo\[verifiers\]"'):
        Source(taskset="sums").load()


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="size: 0 must be at least 1"):
        Source(taskset="sums", size=0)
    with pytest.raises(ValueError, match=r"timeout_s = 0\.0.*both must be positive"):
        Reward(timeout_s=0.0)


def test_a_worker_without_the_library_and_a_secret_that_is_not_set_are_told(tmp_path, monkeypatch):
    (tmp_path / "verifiers.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(tmp_path)
    reward = Reward(workers=2)  # another pool than the other tests'
    with pytest.raises(
        ValueError, match=r'reward kind verifiers: ImportError: not here.*; pip install "gruppo\['
    ):
        reward.open()
    with pytest.raises(ValueError, match=r"NO_SUCH_KEY is not set; export it"):
        Reward(secrets=("NO_SUCH_KEY",)).open()


@pytest.mark.slow
def test_tasks_become_problems(module):
    name = module("sums_read", SUMS)
    problems = Source(taskset=name, size=2, options={"first": 7}, system="Add.").load()
    assert [p.prompt for p in problems] == [
        (Message("system", "Add."), Message("user", "7 + 2")),
        (Message("system", "Add."), Message("user", "8 + 2")),
    ]
    assert [(p.answer, p.source) for p in problems] == [(None, name)] * 2
    assert problems[1].info["verifiers"] == {
        "taskset": name,
        "options": {"first": 7},
        "data": {"idx": 1, "prompt": "8 + 2", "answer": "10"},
    }
    assert len(Source(taskset=name).load()) == 3


@pytest.mark.slow
def test_completions_are_scored_by_the_task_sets_own_functions(module):
    """right + bonus, half for two tokens or fewer, a quarter for the prompt with its system."""
    options = {"task": {"bonus": 4.0}}
    plain, more = (
        Source(taskset=module(name, SUMS), options=settings, system=system).load()[1]
        for name, settings, system in (("sums_a", {}, "Add."), ("sums_b", options, None))
    )
    reward = RewardSet((Part(name="sum", reward=Reward()),))
    rows = [said("3"), said("3", 3), said("4"), said("crash"), said("4", 3)]
    try:
        scores = reward.score_groups([(plain, rows), (more, rows)])
    finally:
        reward.close()
    assert [[s.task for s in group] for group in scores] == [
        [1.75, 1.25, 0.75, None, 0.25],
        [5.5, 5.0, 4.5, None, 4.0],
    ]
    assert [s.total for s in scores[0]] == [s.task for s in scores[0]]
    failure = scores[0][3].error
    assert failure is not None
    assert failure.fault == "grader"
    assert "no brakes" in failure.text


REFUSED = {
    "tool servers": """
        @classmethod
        def toolsets(cls, config):
            return [object()]
    """,
    "a machine to set up": """
        async def setup(self, trace, runtime):
            await runtime.write("a", b"b")
    """,
    "a container": "NEEDS_CONTAINER = True\n",
    "reads files of the machine": """
        @vf.reward
        async def more(self, trace, runtime) -> float:
            return 1.0
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "reason"), list(enumerate(REFUSED)))
def test_task_sets_that_need_more_than_a_turn_are_refused(module, number, reason):
    body = textwrap.indent(textwrap.dedent(REFUSED[reason]), "    ")
    text = SUMS.replace("    @vf.reward\n", f"{body}\n    @vf.reward\n", 1)
    with pytest.raises(ValueError, match=reason):
        Source(taskset=module(f"sums_refused_{number}", text)).load()


NONE = SUMS.replace("@vf.reward(weight=0.5)", "").replace("@vf.reward(weight=0.25)", "")
OTHERS = [
    (NONE.replace("@vf.reward", ""), "3 of 3 rows cannot be used\n.*has no reward function"),
    (SUMS.replace("    def load", "    INFINITE = True\n\n    def load"), "no last task"),
    (SUMS.replace('prompt=f"{n} + 2", ', ""), "field 'question': is an empty list"),
    (SUMS.replace('["Sums"]', "[]"), "cannot be made: .*exports no Taskset"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "text", "reason"), [(n, *rest) for n, rest in enumerate(OTHERS)]
)
def test_what_is_no_task_set_to_train_on_is_refused(module, number, text, reason):
    with pytest.raises(ValueError, match=reason):
        Source(taskset=module(f"sums_other_{number}", text)).load()


@pytest.mark.slow
def test_unknown_names_settings_and_problems_of_other_data_are_told(module):
    with pytest.raises(ValueError, match="'no_such_sums' cannot be made"):
        Source(taskset="no_such_sums").load()
    name = module("sums_settings", SUMS)
    with pytest.raises(ValueError, match=r"cannot be made: (.|\n)*frist"):
        Source(taskset=name, options={"frist": 1}).load()
    problem = Source(taskset=name).load()[0]
    reward = Reward()
    try:
        (value,) = reward(problem, [said("2")])
        assert value == 1.5
        (value,) = reward(replace(problem, info={}), [said("2")])
        assert "of no task set" in value.error.text
    finally:
        reward.close()
