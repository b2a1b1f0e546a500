"""The Python tool: what a program prints and how it ends, and that it reaches nothing."""

import json

import pytest

from gruppo.environment import Python, python_environment
from gruppo.errors import ServiceError
from gruppo.recipe import load
from gruppo.recipe.environment import EnvironmentSection
from gruppo.sandbox import Sandbox
from gruppo.types import Message
from support.boxes import linux
from support.dialogues import problem


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class Echo:
    """A runner that runs nothing."""

    def run(self, code):
        if "boom" in code:
            raise ServiceError("the box is gone")
        return f"ran {len(code)} characters"


def test_python_tool():
    episode = python_environment(Echo()).start(problem())
    answer = episode.reply(call("python", code="print(1)"), ())
    assert answer.messages == (Message("tool", "ran 8 characters"),)
    with pytest.raises(ServiceError, match="the box is gone"):
        episode.reply(call("python", code="boom"), ())


PROGRAMS = [
    ("print(6 * 7)", "42"),
    ("x = 1", "(no output)"),
    ("print('so far')\n1 / 0", "so far\nZeroDivisionError: division by zero"),
    ("while True: pass", "stopped after 1 s of processor time"),
    ("import sys; sys.exit(3)", "exit status 3"),
    ("print(", "SyntaxError: '(' was never closed"),
    (
        "'\ud800'",
        "UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800' in position 1: "
        "surrogates not allowed",
    ),
]


@linux
def test_programs_run_in_a_box():
    episode = Python(sandbox=Sandbox(cpu_s=1, wall_s=20.0)).open().start(problem())
    told = [episode.reply(call("python", code=code), ()).messages for code, _ in PROGRAMS]
    assert [messages[0].content for messages in told] == [wanted for _, wanted in PROGRAMS]


@linux
def test_programs_reach_neither_files_nor_network(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    episode = Python().open().start(problem())
    for code in (
        f"print(open({str(secret)!r}).read())",
        "print(open('/etc/passwd').read())",
        "import socket; socket.create_connection(('127.0.0.1', 9)); print('hidden')",
    ):
        told = episode.reply(call("python", code=code), ()).messages[0].content
        assert "Error" in told
        assert "hidden" not in told


@linux
def test_programs_cannot_outlast_their_turn():
    with pytest.raises(ValueError, match=r"max_seconds = 30: a turn may run 8 programs of 20 s"):
        EnvironmentSection(use=Python(sandbox=Sandbox(cpu_s=2)))
    opened = load("quickstart", ["environment.use=python"]).environment
    assert opened.use == Python()
    assert [tool["function"]["name"] for tool in opened.open().tools] == ["python"]
