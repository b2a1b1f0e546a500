r"""The tests of a programming problem, as they stand in the data: three forms, checked once.

A problem's column (``tests``) holds one object, or its JSON text:

- ``{"stdin": [{"input": "2 3\n", "output": "5\n"}, ...]}``: the program is a script;
- ``{"function": "add", "cases": [{"args": [2, 3], "expected": 5}, ...]}``: ``kwargs`` may be there
  too; ``"Solution.add"`` calls a method of a fresh object. Values are JSON, and types count: a
  tuple is written ``{"$tuple": [1, 2]}`` (the other forms are in ``gruppo.sandbox.wire``);
- ``{"asserts": ["assert add(2, 3) == 5", ...], "setup": "import math"}``: code of your own, each
  entry a test. Names that it uses and does not make are the program's functions; arguments and
  results must be plain data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gruppo.sandbox import Call, decode, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """Inputs of a script, and what it must print."""

    cases: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Calls of a function, and what each must return (in JSON forms)."""

    cases: tuple[tuple[Call, object], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asserts:
    """Trusted test code: each of ``tests`` is run after ``setup``."""

    setup: str
    tests: tuple[str, ...]


Suite = Streams | Calls | Asserts


def read_suite(column: object) -> Suite:
    """The tests that a column holds.

    >>> read_suite('{"function": "f", "cases": [{"args": [1], "expected": 2}]}').cases[0][1]
    2

    Raises:
        ValueError: it holds none of the three forms; the text says what is wrong.
    """
    data = json.loads(column) if isinstance(column, str) else column
    if not isinstance(data, Mapping):
        raise ValueError(f"must be an object, not {type(data).__name__}")
    readers = {"stdin": _streams, "function": _calls, "asserts": _asserts}
    forms = [name for name in readers if name in data]
    if len(forms) != 1:
        raise ValueError(f"must have exactly one of the keys {', '.join(readers)}")
    return readers[forms[0]](data)


def _streams(data: Mapping[str, Any]) -> Streams:
    _only(data, {"stdin"})
    cases = []
    for case in _entries(data, "stdin"):
        _only(case, {"input", "output"})
        if not all(isinstance(case.get(key), str) for key in ("input", "output")):
            raise ValueError("every stdin case needs the texts input and output")
        try:
            case["output"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"no program can print the output of a stdin case: {error}") from error
        cases.append((case["input"], case["output"]))
    return Streams(cases=tuple(cases))


def _calls(data: Mapping[str, Any]) -> Calls:
    _only(data, {"function", "cases"})
    name = data["function"]
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"function: {name!r} must be a name, or Class.method")
    cases = []
    for case in _entries(data, "cases"):
        _only(case, {"args", "kwargs", "expected"})
        args, kwargs = case.get("args", []), case.get("kwargs", {})
        if not isinstance(args, Sequence) or isinstance(args, str) or "expected" not in case:
            raise ValueError("every case needs args (a list) and expected")
        if not isinstance(kwargs, Mapping):
            raise ValueError("kwargs must be an object")
        call = Call(
            name=name,
            args=tuple(_form(value) for value in args),
            kwargs={str(key): _form(value) for key, value in kwargs.items()},
        )
        cases.append((call, _form(case["expected"])))
    return Calls(cases=tuple(cases))


def _asserts(data: Mapping[str, Any]) -> Asserts:
    _only(data, {"asserts", "setup"})
    tests = tuple(data["asserts"]) if isinstance(data["asserts"], list | tuple) else ()
    setup = data.get("setup", "")
    if not tests or not all(isinstance(text, str) for text in (*tests, setup)):
        raise ValueError("asserts must be a list of texts, and setup a text")
    for text in tests:
        compile(f"{setup}\n{text}", "asserts", "exec")
    return Asserts(setup=setup, tests=tests)


def _form(value: object) -> object:
    """The one JSON form of a value that the data write in any of its forms."""
    return encode(decode(value))


def _entries(data: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    entries = data.get(key)
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(f"{key} must be a list with at least one case")
    if not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"every entry of {key} must be an object")
    return entries


def _only(data: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(data) - known):
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
