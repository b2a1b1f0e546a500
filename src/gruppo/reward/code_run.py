"""Running a program against its tests, and comparing: the trusted side of the code reward.

Boxes give data; here it is compared with what was expected, which never enters a box with the
program. Test code of the data runs in a box of its own and calls the program in another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, Final

from gruppo.reward.code_tests import Asserts, Calls, Streams, Suite
from gruppo.sandbox import (
    Binary,
    Call,
    FreshBox,
    NoSandbox,
    Outcome,
    Returned,
    SandboxFailure,
    Toolchain,
    Unsendable,
    compile_program,
    same,
)
from gruppo.sandbox.wire import check

_TEXT: Final = 200


class WrongTests(RuntimeError):
    """The tests themselves failed, without the program having been called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A program to be run against its tests; ``fast`` stops at the first that fails.

    ``binary`` is the program compiled, where its language is.
    """

    source: str
    suite: Suite
    fast: bool
    binary: Binary | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How many tests passed, and how the first failure looked (``kind`` "" if it was an answer)."""

    passed: int
    total: int
    kind: str = ""
    text: str = ""


def build(fresh: FreshBox, trial: Trial, chain: Toolchain) -> Trial | Result:
    """Compile a program in a fresh box: the trial with it, or why no test can pass.

    What the compiler says is not told: it is the program's text in other words.

    Raises:
        SandboxFailure, NoSandbox: no fault of the program. It costs this row alone.
    """
    try:
        made = compile_program(fresh, chain, trial.source)
    except OSError as error:  # no descriptors or processes left, say
        raise SandboxFailure(f"{type(error).__name__}: {error}") from error
    if isinstance(made, Binary):
        return replace(trial, binary=made)
    kind = "compile_timeout" if made.ended in ("cpu", "wall") else "compile_error"
    total = len(trial.suite.cases) if isinstance(trial.suite, Streams) else 1
    text = f"{chain.program}: {made.text or made.ended}"
    return Result(passed=0, total=total, kind=kind, text=text)


def run(fresh: FreshBox, trial: Trial) -> Result | WrongTests:
    """Run a program against its tests in fresh boxes.

    Raises:
        SandboxFailure, NoSandbox: no fault of these tests. Whatever else fails costs this row
            alone, and not the batch that it is in.
    """
    try:
        return _run(trial.suite, fresh, trial)
    except WrongTests as error:
        return error
    except (SandboxFailure, NoSandbox):
        raise
    except OSError as error:  # no descriptors or processes left, say
        raise SandboxFailure(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        return WrongTests(f"{type(error).__name__}: {error}"[:_TEXT])


@singledispatch
def _run(suite: Suite, fresh: FreshBox, trial: Trial) -> Result:
    raise AssertionError(f"no such tests: {suite}")


@_run.register
def _(suite: Streams, fresh: FreshBox, trial: Trial) -> Result:
    def one(case: tuple[str, str]) -> _Verdict:
        given, expected = case
        box = fresh()
        stdin = given.encode(errors="surrogatepass")
        if trial.binary is None:
            outcome = box.script(trial.source, stdin)
        else:
            outcome = box.native(trial.binary, stdin)
        box.close()
        if outcome.ended != "exit" or outcome.code != 0:
            text = outcome.text or _last_line(outcome.stderr)
            # a box for each case: what a crash says of the others is nothing, but a program that
            # runs to a limit in every case would hold a slot for hours
            final = outcome.ended in ("cpu", "wall", "output")
            return _Verdict(kind=_kind(outcome), text=text, right=False, final=final)
        return _Verdict(right=_lines(outcome.stdout) == _lines(expected.encode()))

    return _count([lambda case=case: one(case) for case in suite.cases], fast=trial.fast)


@_run.register
def _(suite: Calls, fresh: FreshBox, trial: Trial) -> Result:
    box = fresh()
    loaded = _verdict(box.load(trial.source), None)
    if not loaded.right:
        return Result(passed=0, total=len(suite.cases), kind=loaded.kind, text=loaded.text)

    def one(call: Call, expected: object) -> _Verdict:
        return _verdict(box.call(call), expected)

    return _count(
        [
            lambda call=call, expected=expected: one(call, expected)
            for call, expected in suite.cases
        ],
        fast=trial.fast,
    )


@_run.register
def _(suite: Asserts, fresh: FreshBox, trial: Trial) -> Result:
    total = len(suite.tests)
    program = fresh()
    loaded = _verdict(program.load(trial.source), None)
    if not loaded.right:
        return Result(passed=0, total=total, kind=loaded.kind, text=loaded.text)
    tests = fresh()
    tests.begin_tests(suite.setup, list(suite.tests))
    passed, seen, called, kind, text = 0, 0, False, "", ""
    while seen < total:
        message = _read(tests.next_message())
        # All tests share a box: after any call, its state may be the program's doing.
        if not called and isinstance(message, str):
            raise WrongTests(f"test {seen} {message}")
        if isinstance(message, str):
            return Result(passed=passed, total=total, kind="tests", text=message)
        if isinstance(message, Call):
            called, returned = True, program.call(message)
            if isinstance(returned, Outcome):
                return Result(passed=passed, total=total, kind=_kind(returned), text=returned.text)
            if returned.error is not None:
                kind, text = kind or returned.kind, text or _told(returned)
            tests.answer(returned)
            continue
        if not (called or message.right):
            raise WrongTests(f"test {seen} fails without calling anything: {message.text}")
        passed, seen = passed + message.right, seen + 1
        if trial.fast and not message.right:
            break
    return Result(passed=passed, total=total, kind=kind, text=text)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """Of one case; ``final``: those after it count as failed."""

    right: bool
    kind: str = ""
    text: str = ""
    final: bool = False


def _verdict(returned: Outcome | Returned, expected: object) -> _Verdict:
    """Compare what a call gave with what it should give."""
    if isinstance(returned, Outcome):
        return _Verdict(right=False, kind=_kind(returned), text=returned.text, final=True)
    if returned.error is not None:
        return _Verdict(right=False, kind=returned.kind, text=_told(returned))
    return _Verdict(right=same(expected, returned.value))


def _count(cases: list[Callable[[], _Verdict]], *, fast: bool) -> Result:
    """Run cases in order, to the first failure that is final or after which nobody asks."""
    passed, first = 0, _Verdict(right=True)
    for case in cases:
        verdict = case()
        passed += verdict.right
        if not verdict.right and (first.right or not first.kind):
            first = verdict
        if verdict.final or (fast and not verdict.right):
            break
    return Result(passed=passed, total=len(cases), kind=first.kind, text=first.text)


def _read(message: Outcome | dict[str, Any]) -> Call | _Verdict | str:
    """What test code says: a call that it asks for, a test's verdict, or how it ended."""
    if isinstance(message, Outcome):
        return f"ended by itself: {_kind(message)}"
    if "call" not in message:
        return _Verdict(right=message.get("passed") is True, text=f"{message.get('error')}")
    try:
        args = tuple(check(message["args"]))
        return Call(name=str(message["call"]), args=args, kwargs=message["kwargs"])
    except (Unsendable, KeyError, TypeError) as error:
        return f"called with {error}"


def _kind(outcome: Outcome) -> str:
    """A short name for how a program ended."""
    names = {"cpu": "timeout", "wall": "timeout", "output": "oversize", "signal": "crash"}
    return names.get(outcome.ended, f"exit_{outcome.code}" if outcome.ended == "exit" else "reply")


def _told(returned: Returned) -> str:
    return f"{returned.error}: {returned.text}"[:_TEXT]


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return ascii(lines[-1][:_TEXT]) if lines else ""


def _lines(text: bytes) -> list[bytes]:
    """Lines without trailing white space, and without empty lines at the end."""
    lines = [line.rstrip() for line in text.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines
