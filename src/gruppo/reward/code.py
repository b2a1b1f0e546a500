"""The code reward: a program is taken out of a completion and run against tests, in a box.

It judges what a program returns or prints, never how it looks. How programs are isolated is the
sandbox's matter (``gruppo.sandbox``); what the tests are, the data's (``code_tests``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar, Final, Literal

from gruppo.reward.base import GroupRows, Value, refused, ungraded
from gruppo.reward.code_run import Result, Trial, WrongTests, build, run
from gruppo.reward.code_tests import Streams, Suite, read_suite
from gruppo.reward.extract import after_thinking
from gruppo.sandbox import (
    CPP,
    C,
    Choice,
    Sandbox,
    SandboxFailure,
    Toolchain,
    boxes,
    choose,
    try_out,
    workshop,
)
from gruppo.types import Completion, Problem

_MAX_SOURCE: Final = 100_000  # characters; a program that is longer is no answer to a problem
_AHEAD: Final = 16  # programs that are compiled before they are run: they lie in memory
# The language's name and version before attributes and files: {.python .id}, python:a.py. Behind a
# brace it may stand after others, of which a language is none: {#id .python}, {at="5" .python}.
# Nothing is tried twice: a line is as long as a model likes.
_NAME: Final = re.compile(
    r"""(?:\{\s*+(?:(?:\#[^\s}]++|[\w:-]++=(?:"[^"]*+"|'[^']*+'|[^\s"'}]*+))\s++)*+)?"""
    r"\.?([\w+#-]++(?:\.\d[\w+#-]*+)*+)"
)
# Of a version the first number counts: python3.11, python-3.11, python3.9+, c++-17. A hyphen before
# anything else is of the name: it makes another language of it (python-repl, c-sharp).
_DATED: Final = re.compile(r"([^\d.]*[^\d.-])-?(\d++)(?:\.\d[a-z\d]*+)*+\+?")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Language:
    """How a block of it is fenced, the marks by which one is known, and its compiler, if any."""

    fence: str
    marks: frozenset[str]
    chain: Toolchain | None = None


def _dated(*marks: str, years: str) -> frozenset[str]:
    """Marks alone, and with the years of the language's standards behind them."""
    return frozenset(mark + year for mark in marks for year in ("", *years.split()))


_LANGUAGES: Final = {
    "python": _Language(fence="python", marks=frozenset({"python", "python3", "py", "py3"})),
    "c": _Language(fence="c", marks=_dated("c", years="90 99 11 17 23"), chain=C),
    "cpp": _Language(
        fence="cpp",
        marks=_dated("cpp", "c++", years="11 14 17 20 23") | {"cc", "cxx"},
        chain=CPP,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """The share of its tests that a completion's program passes.

    The program is the last fenced block after ``</think>`` that is marked as of ``language``, or
    where none is, the last without a mark; blocks of other marks (``text``, ``bash``) are none
    (``extract = "all"``: all of the text there). "c" and "cpp" are compiled (``gcc`` or ``g++``,
    -O2, static) in one box and run in another, and have tests of standard input only; what does
    not compile scores the minimum. The tests stand in the problem's
    column ``column``, in one of the forms of ``code_tests``. ``score = "all"`` gives 1 only if
    every test passes, and stops at the first that fails.

    ``sandbox`` says how programs are run: see ``gruppo.sandbox.Sandbox``. Standard input cases get
    a fresh box each; function cases and assertions one for the program (and one for the test code).
    A program that runs out of time or writes too much fails the tests that are left, and so does
    one that crashes, except in the fresh boxes of standard input. With none passed it scores the
    part's minimum, counted by kind. Where the sandbox itself fails, or test code without having
    called the program, the row is unscored.

    Raises:
        ValueError: no workers.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["code"] = "code"
    language: Literal["python", "c", "cpp"] = "python"
    column: str = "tests"
    extract: Literal["last_block", "all"] = "last_block"
    score: Literal["fraction", "all"] = "fraction"
    workers: int = 2
    sandbox: Sandbox = field(default_factory=Sandbox)

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= 256:
            raise ValueError(f"code.workers = {self.workers}: must be from 1 to 256")
        if self.language != "python" and self.sandbox.kind == "wasi":
            raise ValueError(
                f'code.language = "{self.language}" with sandbox.kind = "wasi", which runs Python '
                'alone: set language = "python", or sandbox.kind = "bubblewrap" or "lite" (Linux)'
            )

    def open(self, report: Callable[[str], None] = lambda text: None) -> Choice:
        """Choose the box and try it, and the compiler if there is one.

        ``report`` hears of downloads.

        Raises:
            NoSandbox: none holds here; the text says how to get one.
        """
        chosen, chain = choose(self.sandbox, report), self._language.chain
        if chain is None:
            return chosen
        return replace(chosen, text=f"{chosen.text}; {try_out(self.sandbox, chain)}")

    def template(self) -> str:
        """A completion with ``{answer}`` where the program is read."""
        fence = self._language.fence
        return "{answer}" if self.extract == "all" else f"```{fence}\n{{answer}}\n```"

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade one group."""
        return self.score_batch([(problem, completions)])[0]

    def score_batch(self, groups: Sequence[GroupRows]) -> list[list[Value]]:
        """Grade all groups: their programs run side by side, each different one once."""
        prepared = [self._prepare(*group) for group in groups]
        trials = [trial for row in prepared for trial in row if isinstance(trial, Trial)]
        slots: dict[tuple[int, str], int] = {}
        distinct: list[Trial] = []
        for trial in trials:
            if slots.setdefault(_identity(trial), len(distinct)) == len(distinct):
                distinct.append(trial)
        results = self._results(distinct) if distinct else []
        return [
            [
                self._value(results[slots[_identity(entry)]]) if isinstance(entry, Trial) else entry
                for entry in row
            ]
            for row in prepared
        ]

    def close(self) -> None:
        """End the boxes."""
        boxes(self.sandbox, self.workers).close()
        if (chain := self._language.chain) is not None:
            workshop(self.sandbox, self.workers, chain).close()

    @property
    def _language(self) -> _Language:
        return _LANGUAGES[self.language]

    def _results(self, trials: list[Trial]) -> list[Result | WrongTests | SandboxFailure]:
        """Run them; what has to be compiled is, a few at a time."""
        chain, pool = self._language.chain, boxes(self.sandbox, self.workers)
        if chain is None:
            return pool.map(run, trials)
        makers = workshop(self.sandbox, self.workers, chain)
        results: list[Result | WrongTests | SandboxFailure] = []
        for start in range(0, len(trials), step := max(_AHEAD, self.workers)):
            some = trials[start : start + step]
            built = makers.map(lambda fresh, trial: build(fresh, trial, chain), some)
            ran = iter(pool.map(run, [made for made in built if isinstance(made, Trial)]))
            results += [next(ran) if isinstance(made, Trial) else made for made in built]
        return results

    def _prepare(self, problem: Problem, completions: Sequence[Completion]) -> list[Value | Trial]:
        """Take the programs out of the completions; what has none is decided here."""
        if self.column not in problem.info:
            return [
                ungraded("gold_missing", f"problem {problem.id!r} has no column {self.column!r}")
            ] * len(completions)
        try:
            suite = _suite(_key(problem.info[self.column]))
        except (ValueError, SyntaxError, TypeError, RecursionError) as error:
            text = f"problem {problem.id!r}, column {self.column!r}: {error}"
            return [ungraded("gold_unreadable", text)] * len(completions)
        if self._language.chain is not None and not isinstance(suite, Streams):
            text = (
                f"problem {problem.id!r}, column {self.column!r}: {self.language} programs have "
                'tests of the form {"stdin": [...]} alone; functions can be called in Python only'
            )
            return [ungraded("tests_wrong", text)] * len(completions)
        return [self._trial(completion.text, suite) for completion in completions]

    def _trial(self, text: str, suite: Suite) -> Value | Trial:
        answer = after_thinking(text)
        source = answer if self.extract == "all" else last_block(answer, self._language.marks)
        if source is None or not source.strip():
            return refused("no_program", "no fenced block with a program")
        if len(source) > _MAX_SOURCE:
            return refused("oversize", f"a program of {len(source)} characters")
        return Trial(source=source, suite=suite, fast=self.score == "all")

    def _value(self, result: Result | WrongTests | SandboxFailure) -> Value:
        if isinstance(result, SandboxFailure):
            return ungraded("sandbox", str(result))
        if isinstance(result, WrongTests):
            return ungraded("tests_wrong", str(result))
        share = result.passed / result.total
        value = share if self.score == "fraction" else float(result.passed == result.total)
        if value == 0 and result.kind:
            return refused(result.kind, result.text or result.kind)
        return value


def last_block(text: str, marks: Set[str]) -> str | None:
    r"""The content of the last closed fenced block that has one of ``marks``.

    Where none has, of the last without a mark; None where there is no such either. What a program
    prints is often shown behind it, so that a block without a mark does not come before a marked
    one. The mark is the first name after the fence: of ``{#id .python .cell}`` and ``python:a.py``
    it is "python", of ``python3.11`` and ``python-3.11`` it is "python3".

    >>> text = "```py\nx = 1\n```\nprints\n```\n1\n```\nas in\n```text\n1\n```"
    >>> last_block(text, {"py"}), last_block(text, {"cpp"}), last_block("```\nopen", {"py"})
    ('x = 1\n', '1\n', None)
    """
    marked, bare, start, mark = None, None, None, ""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        stripped = line.strip()
        if start is None and stripped.startswith("```") and "`" not in stripped[3:]:
            start, mark = number + 1, _mark(stripped[3:].strip().lower())
        elif start is not None and stripped == "```":
            block = "".join(lines[start:number])
            marked = block if mark in marks else marked
            bare = block if not mark else bare
            start = None
    return bare if marked is None else marked


def _mark(text: str) -> str:
    """The language's name behind a fence; what holds none is a mark still (``{=html}``)."""
    found = _NAME.match(text)
    if found is None:
        return text
    dated = _DATED.fullmatch(found[1])
    return found[1] if dated is None else dated[1] + dated[2]


def _identity(trial: Trial) -> tuple[int, str]:
    """Equal for equal programs of one problem: suites are cached, so one object each."""
    return id(trial.suite), trial.source


def _key(column: object) -> str:
    """The column as text, to cache what it means."""
    return column if isinstance(column, str) else json.dumps(column)


@lru_cache(maxsize=4096)
def _suite(column: str) -> Suite:
    return read_suite(column)
