"""A Python tool: the policy writes a program, and gets what it prints.

Nothing is run here. The ``Runner`` is handed in, and it must be one that isolates: what it runs was
written by the model that is being trained.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from gruppo.environment.calls import CallFormat
from gruppo.environment.tools import Tool, Toolbox


@runtime_checkable
class Runner(Protocol):
    """Runs a program in isolation, with limits of its own on time, memory and output."""

    def run(self, code: str) -> str:
        """Run ``code`` and return what is to be told: its output, errors and limits included.

        Raises OSError or gruppo.errors.ServiceError if the isolation itself failed.
        """
        ...


def python_tool(runner: Runner) -> Tool:
    """The tool ``python``, whose programs ``runner`` runs."""

    def python(code: str) -> str:
        """Run a Python program and return what it prints.

        Args:
            code: the program; print what you want to know.
        """
        return runner.run(code)

    return Tool.of(python)


def python_environment(
    runner: Runner, *, calls: CallFormat = "hermes", max_result: int = 2000
) -> Toolbox:
    """The environment whose only tool is ``python``."""
    return Toolbox(items=(python_tool(runner),), calls=calls, max_result=max_result)
