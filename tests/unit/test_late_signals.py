"""Signals that come before a run has begun or after it has ended: an orderly exit code."""

import signal
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import atexit, os, signal, sys, threading
from gruppo.cli import main
NUMBER = int(sys.argv.pop())
BELL = lambda *_: os.kill(os.getpid(), NUMBER)
"""


def program(code: str, *command: object) -> subprocess.CompletedProcess[str]:
    text = PROGRAM + textwrap.dedent(code) + "\nsys.exit(main())\n"
    words = [sys.executable, "-c", text, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_while_the_interpreter_ends_changes_nothing(number):
    done = program("atexit.register(BELL)", "recipes", int(number))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_signal_outside_of_the_loop_ends_in_order(number, code):
    done = program(
        "import gruppo.cli.listing; gruppo.cli.listing.read = BELL", "recipes", "dapo", int(number)
    )
    assert done.returncode == code
    assert done.stderr == f"{signal.Signals(number).name}: stopped\n"
