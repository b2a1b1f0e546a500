"""A Python tool: the policy writes a program, and gets what it prints.

A ``Runner`` runs the programs, and must isolate them: they were written by the model that is being
trained. ``BoxRunner`` is ours: every program gets a fresh box of ``gruppo.sandbox``, so nothing is
kept from one call to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal, Protocol, runtime_checkable

from gruppo.environment.calls import CallFormat
from gruppo.environment.tools import MAX_CALLS, Tool, Toolbox, check_result_size
from gruppo.errors import ServiceError
from gruppo.sandbox import FreshBox, Outcome, Pool, Sandbox, SandboxFailure, choose

_WALL_S: Final = 3.0
"""Seconds on the clock of a program, if the recipe says none: a turn may have several programs,
and must be answered within ``environment.max_seconds``."""


@runtime_checkable
class Runner(Protocol):
    """Runs a program in isolation, with limits of its own on time, memory and output."""

    def run(self, code: str) -> str:
        """Run ``code`` and return what is to be told: its output, errors and limits included.

        Raises gruppo.errors.ServiceError if the isolation itself failed.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxRunner:
    """Runs programs in boxes of ``sandbox``; as many at once as there are callers."""

    sandbox: Sandbox
    _free: list[Pool] = field(default_factory=list, init=False, repr=False, compare=False)

    def run(self, code: str) -> str:
        """Run ``code`` in a fresh box: its output, and how it ended if not well.

        Raises:
            ServiceError: the box failed before the program ran.
            NoSandbox: no box holds on this machine.
        """
        try:
            pool = self._free.pop()
        except IndexError:
            pool = Pool(lambda: choose(self.sandbox).backend, self.sandbox, 1)
        try:
            outcome = pool.map(_script, [code])[0]
        finally:
            self._free.append(pool)
        if isinstance(outcome, SandboxFailure):
            raise ServiceError(f"the sandbox failed: {outcome}")
        return self._told(outcome)

    def _told(self, outcome: Outcome) -> str:
        ends = {
            "cpu": f"stopped after {self.sandbox.cpu_s} s of processor time",
            "wall": f"stopped after {self.sandbox.wall:g} s",
            "output": f"stopped: more than {self.sandbox.output_mib} MiB of output",
            "signal": f"ended by signal {outcome.code}",
            "protocol": "ended without a result",
        }
        output = outcome.stdout.decode(errors="replace").rstrip("\n")
        if outcome.ended == "exit":
            said = outcome.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            end = (said or f"exit status {outcome.code}") if outcome.code else ""
        else:
            end = ends[outcome.ended]
        return "\n".join(filter(None, (output, end))) or "(no output)"


def _script(fresh: FreshBox, code: str) -> Outcome:
    return fresh().script(code, b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Python:
    """The policy may run Python programs, each in a fresh box; it is told what they print.

    ``sandbox`` says how they are isolated, and the limits of each: see ``gruppo.sandbox.Sandbox``
    (without it ``wall_s`` is 3). What a program printed is told, and if it failed its error's last
    line or the limit that it met.
    ``calls`` is how calls are written ("hermes", "llama" or "fenced": what the chat template
    shows), ``max_result`` the most characters of a result.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["python"] = "python"
    calls: CallFormat = "hermes"
    max_result: int = 2000
    sandbox: Sandbox = field(default_factory=lambda: Sandbox(wall_s=_WALL_S))

    def __post_init__(self) -> None:
        check_result_size(self.max_result)

    def check(self, max_seconds: float) -> None:
        """Refuse limits under which a turn's programs could outlast its answer.

        Raises:
            ValueError: they could, so that a policy would be unscored by sleeping.
        """
        wall = self.sandbox.wall
        if MAX_CALLS * wall >= max_seconds:
            raise ValueError(
                f"environment.max_seconds = {max_seconds:g}: a turn may run {MAX_CALLS} programs "
                f"of {wall:g} s (use.sandbox.wall_s; ten times cpu_s unless given), and one that "
                f"lasts longer is unscored; set max_seconds above {MAX_CALLS * wall:g}, or wall_s "
                f"to {max_seconds / MAX_CALLS / 1.25:.1f}"
            )

    def open(self, report: Callable[[str], None] = lambda text: None) -> Toolbox:
        """Choose the box and try it; ``report`` hears of downloads.

        Raises:
            NoSandbox: none holds here; the text says how to get one.
        """
        choose(self.sandbox, report)
        runner = BoxRunner(sandbox=self.sandbox)
        return python_environment(runner, calls=self.calls, max_result=self.max_result)
