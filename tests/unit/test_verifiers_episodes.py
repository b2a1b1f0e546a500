"""Episodes of the verifiers library's environments: tools and users answer, its rewards judge.

Where the library is installed (extra ``verifiers``) it is what runs, else ``verifiers_fake``, which
has its interface.
"""

import asyncio
import contextlib
import importlib.util
import json
import socket
import sys
import threading
from pathlib import Path

import pytest

from gruppo.data import Verifiers as Source
from gruppo.environment import Episodes, Limits, Verifiers, VerifiersEnvironment
from gruppo.environment.calls import BadCall, Call, find_calls
from gruppo.environment.verifiers import _plain
from gruppo.errors import ServiceError
from gruppo.recipe.environment import EnvironmentSection
from gruppo.types import Message, Request, Sampling
from support.dialogues import Letters, Script, problem
from support.verifiers_sets import GAME, HEAD, TOOLS

FAKE = Path(__file__).parents[1] / "support" / "verifiers_fake"
REAL = importlib.util.find_spec("verifiers") is not None
pytestmark = [pytest.mark.slow] if REAL else []


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a task set as an importable module; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    if not REAL:
        monkeypatch.syspath_prepend(FAKE)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(HEAD + text)
        return name

    yield write
    for name in () if REAL else set(sys.modules) - known:
        if name.partition(".")[0] in ("verifiers", "mcp") or "worker.verifiers" in name:
            del sys.modules[name]


@pytest.fixture
def opened():
    """Opens environments and closes them."""
    made = []

    def open_(**settings):
        made.append(Verifiers(**settings).open())
        return made[-1]

    yield open_
    for one in made:
        one.close()


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def draw(environment, problems, turns, *, limits=None, max_tokens=3000):
    """Two samples for each problem, their turns as scripted."""
    encoder = Letters()
    requests = [
        Request(
            tokens=encoder.encode(p.prompt), num_samples=len(turns[p.prompt[0].content]), key=(n,)
        )
        for n, p in enumerate(problems)
    ]
    episodes = Episodes(
        engine=Script(turns),
        environment=environment,
        encoder=encoder,
        limits=limits or Limits(max_turns=5),
    )
    return episodes.draw(problems, requests, Sampling(max_tokens=max_tokens))


def said(completion):
    return [m.content for m in completion.interaction.messages if m.role != "assistant"]


def test_tools_with_a_state_answer_and_the_tasks_rewards_judge(module, opened):
    name = module("adding", TOOLS)
    environment = opened(taskset=name)
    (tool,) = environment.tools
    assert tool["function"]["name"] == "add"
    assert tool["function"]["description"] == "Add a number to the total."
    assert tool["function"]["parameters"]["properties"]["number"]["type"] == "integer"
    assert '"add"' in environment.instructions
    problems = Source(taskset=name, size=2, episodes=True).load()
    one, two = call("add", number=1), call("add", number=2)
    wrong = (
        call("add", number=-1) + call("sub") + "<tool_call>x</tool_call>" + call("add", number="x")
    )
    turns = {
        "a": [[two, "done"], [one + one, "done"]],
        "b": [[wrong, one, "done"], ["done"]],
    }
    (first, second), (third, fourth) = draw(environment, problems, turns)
    assert said(first) == ["total 3 of 3"]
    assert said(second) == ["total 2 of 3", "total 3 of 3"]
    errors = said(third)
    assert errors[0] == "error: Error executing tool add: -1 is negative"
    assert errors[1] == "error: there is no tool 'sub'; there are: add"
    assert errors[2] == "error: a tool call must be one JSON object"
    assert "valid integer" in errors[3]
    assert errors[4:] == ["total 2 of 4"]
    counts = [
        (c.interaction.calls, c.interaction.failed_calls) for c in (first, second, third, fourth)
    ]
    assert counts == [(1, 0), (2, 0), (5, 4), (0, 0)]
    # right, a quarter for each turn, and what the trace holds: its messages, the policy's tokens
    drawn = [sum(c.mask) for c in (first, second, third, fourth)]
    assert [c.interaction.reward for c in (first, second, third, fourth)] == pytest.approx(
        [
            1 + 0.5 + 0.01 * (4 + 100 * drawn[0]),
            1 + 0.5 + 0.01 * (5 + 100 * drawn[1]),
            0 + 0.75 + 0.01 * (9 + 100 * drawn[2]),
            0 + 0.25 + 0.01 * (2 + 100 * drawn[3]),
        ]
    )
    assert [c.finish for c in (first, second, third, fourth)] == ["stop"] * 4


def test_an_environments_own_turns_answer_and_its_limits_end_them(module, opened):
    name = module("guessing", GAME)
    environment = opened(taskset=name, settings={"worth": 2.0})
    assert (environment.tools, environment.instructions) == ((), "")
    problems = Source(taskset=name, episodes=True).load()
    turns = {
        "a": [["3", "7", "5"], ["5"]],
        "b": [["1", "2", "3", "4"], ["four"]],
    }
    limits = Limits(max_turns=3, workers=2)
    (first, second), (third, fourth) = draw(environment, problems, turns, limits=limits)
    assert [said(c) for c in (first, second, third)] == [["higher", "lower"], [], ["higher"] * 2]
    assert [c.interaction.ended for c in (first, second, third)] == [
        "environment",
        "environment",
        "turns",
    ]
    # half for every message of the trace, two for the number, an eighth for a run-away exchange
    rewards = [c.interaction.reward for c in (first, second, third)]
    assert rewards == [2 + 0.5 * 6, 2 + 0.5 * 2, 0.125 + 0.5 * 6]
    assert fourth.finish == "error"
    assert "ValueError: invalid literal for int()" in fourth.interaction.error
    assert first.tokens[:4] == (ord("3"), 0, 1, ord("h"))


def test_an_episode_that_hangs_or_dies_costs_itself_alone(module, opened):
    name = module("adding_hangs", TOOLS)
    environment = opened(taskset=name, timeout_s=3.0)
    problems = Source(taskset=name, episodes=True).load()
    two, hang, die = (call("add", number=n) for n in (2, 99, 98))
    turns = {"a": [[hang, "done"], [two, "done"]], "b": [[die, "done"], [two, two, two, two, "x"]]}
    (first, second), (third, fourth) = draw(environment, problems[:2], turns)
    assert "no answer within 3 s" in first.interaction.error
    assert second.interaction.ended == "environment"
    assert second.interaction.reward > 1.5
    assert "the process ended (exit status 3)" in third.interaction.error
    assert said(fourth) == ["total 3 of 4", "total 5 of 4", "total 7 of 4"]  # then the task stops
    assert fourth.interaction.ended == "environment"


REFUSED = {
    "2 agents": (GAME, "    worth:", "    other: vf.AgentConfig = vf.AgentConfig()\n    worth:"),
    "a container": (
        TOOLS,
        "    async def setup(self, trace):",
        "    NEEDS_CONTAINER = True\n\n    async def setup(self, trace):",
    ),
    r"a machine to set up \(runtime\)": (
        TOOLS,
        "setup(self, trace)",
        "setup(self, trace, runtime)",
    ),
    "the tools '' elsewhere": (TOOLS, "vf.ToolsetConfig())]", "vf.ToolsetConfig(url='http://x'))]"),
    r"the program \(harness\) 'bash'": (
        GAME,
        "vf.AgentConfig()\n",
        "vf.AgentConfig(harness={'id': 'bash'})\n",
    ),
}


@pytest.mark.parametrize(("number", "reason"), list(enumerate(REFUSED)))
def test_what_needs_more_than_a_chat_with_tools_is_refused(module, number, reason):
    text, old, new = REFUSED[reason]
    name = module(f"episodes_refused_{number}", text.replace(old, new, 1))
    from gruppo.worker.verifiers.scene import Refused, Scene

    with pytest.raises(Refused, match=rf"needs {reason}.*which is not run here"):
        Scene.load(name, {}, {})


def played(name, data, *turns):
    """What an episode says, played in a thread of this process."""
    from gruppo.worker.verifiers.play import play
    from gruppo.worker.verifiers.scene import Scene

    scene = Scene.load(name, {}, {})
    ours, theirs = socket.socketpair()
    given = {"data": data, "prompt": [{"role": "user", "content": data["prompt"]}]}

    def run():
        with contextlib.suppress(SystemExit):  # at the end of the socket
            asyncio.run(play(scene, given, theirs, 100))

    thread = threading.Thread(target=run)
    thread.start()
    with ours, ours.makefile("rw") as line:
        said = [json.loads(line.readline())]
        for text in turns:
            line.write(json.dumps({"do": "reply", "text": text, "tokens": 1, "calls": []}) + "\n")
            line.flush()
            said.append(json.loads(line.readline()))
    thread.join()
    return said


ENDED = [
    (
        TOOLS.replace("def turns(self, trace)", "def turns(self, trace, runtime)"),
        "needs rewards that read files of the policy's machine (runtime), which is not run here",
    ),
    (
        GAME.replace(
            "        talk.trace.rec",
            "        await agents.player.run(task)\n" + " " * 8 + "talk.trace.rec",
        ),
        "Refused: needs a second conversation of the agent",
    ),
    (
        GAME.replace("interaction(task)", "interaction(task.with_data(prompt='b'))"),
        "the environment opens with [{'role': 'user', 'content': 'b'}], the data with",
    ),
    (GAME.replace("await talk.turn()", "await talk.turn('hi')"), "the environment opens with"),
]


@pytest.mark.parametrize(("number", "text", "words"), [(n, *rest) for n, rest in enumerate(ENDED)])
def test_what_is_seen_only_in_an_episode_ends_it(module, number, text, words):
    name = module(f"episodes_ended_{number}", text)
    data = {"prompt": "a", "secret": 5, "goal": 5}
    assert words in played(name, data, "5")[-1 if number == 1 else 0]["failure"]


def test_an_episode_that_cannot_begin_leaves_no_process(module, opened):
    name = module("episodes_unbegun", ENDED[2][0])
    environment = opened(taskset=name)
    (one, *_) = Source(taskset=name, episodes=True).load()
    worker = environment.free[0]._worker.pid
    for _ in range(2):
        with pytest.raises(ServiceError, match="the environment opens with"):
            environment.start(one)
    assert Path(f"/proc/{worker}/task/{worker}/children").read_text().split() == []


def test_a_call_that_no_tool_could_be_told_is_answered_as_one():
    half = find_calls(r'<tool_call>{"name": "add", "arguments": ["\ud800"]}</tool_call>', "hermes")
    assert [_plain(call) for call in [*half, Call("add", {"a": 1}), BadCall("no")]] == [
        {"bad": "a tool call must have no halves of surrogate pairs"},
        {"name": "add", "arguments": {"a": 1}},
        {"bad": "no"},
    ]


def test_other_problems_and_data_without_episodes_are_refused(module):
    name = module("adding_other", TOOLS)
    environment = EnvironmentSection(use=Verifiers(taskset=name)).open()
    assert isinstance(environment, VerifiersEnvironment)
    with pytest.raises(ValueError, match="'go' is not of task set 'adding_other'"):
        environment.start(problem())
    with pytest.raises(ValueError, match=r"tool servers.*episodes = true"):
        Source(taskset=name).load()
    assert environment.prompt(problem()) == (Message("user", "go"),)
    environment.close()


def test_settings_out_of_range_and_a_missing_library_are_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"timeout_s = 0\.0: must be positive"):
        Verifiers(taskset="adding", timeout_s=0.0)
    with pytest.raises(ValueError, match=r"max_seconds = 24: must be at least 5 more.*= 20"):
        Verifiers(taskset="adding").check(24.0, 1)
    with pytest.raises(ValueError, match=r"workers = 2: .* use 1"):
        EnvironmentSection(use=Verifiers(taskset="adding"), workers=2)
    Verifiers(taskset="adding").check(25.0, 1)
    (tmp_path / "verifiers.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'adding': .*not here.*pip install \"gruppo\[verifiers"):
        Verifiers(taskset="adding").open()
