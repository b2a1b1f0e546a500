"""Reading tool calls out of a turn's text, in the way of each family of chat templates.

What stands in a think block is no call. What tries to be a call and is none is told as such, so
that the policy gets an error for it and not an end. Nothing here is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal, Protocol, runtime_checkable

CallFormat = Literal["hermes", "llama", "fenced"]
"""How calls are written: ``<tool_call>{"name", "arguments"}</tool_call>`` (Hermes, Qwen, SmolLM3);
the turn is one JSON object with "name" and "parameters" (Llama 3); a ```` ```json ```` block.
"""

_TAG: Final = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FENCE: Final = re.compile(r"```(?:json|tool_call)\s*\n(.*?)(?:```|\Z)", re.DOTALL)
_PYTHON: Final = "<|python_tag|>"
_MARKS: Final[dict[CallFormat, str]] = {"hermes": "<tool_call>", "llama": _PYTHON}
_MAX_DEPTH: Final = 64  # of nested arguments: more would not pass to where the tool runs
_MAX_TEXT: Final = 20_000  # characters of one call; tool code is a page, the rest is a runaway


@dataclass(frozen=True, slots=True)
class Call:
    """A call as written: the tool's name, and its arguments as parsed JSON (of any type)."""

    name: str
    arguments: object


@dataclass(frozen=True, slots=True)
class BadCall:
    """What tried to be a call, and why it is none."""

    reason: str


@runtime_checkable
class ReadsCalls(Protocol):
    """An environment that reads tool calls out of turns."""

    @property
    def calls(self) -> CallFormat:
        """How they are written."""
        ...


def spoken(text: str) -> str:
    """``text`` without its thinking: after the last ``</think>``, before one left open.

    >>> spoken("<think>a</think>b<think>c")
    'b'
    """
    return text.rpartition("</think>")[2].partition("<think>")[0]


def find_calls(text: str, form: CallFormat) -> list[Call | BadCall]:
    r"""The calls of a turn, in order; an empty list if it asks for none.

    >>> find_calls('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "hermes")
    [Call(name='add', arguments={'a': 1})]
    >>> find_calls("<tool_call>add 1</tool_call>", "hermes")
    [BadCall(reason='a tool call must be one JSON object')]
    """
    return _READERS[form](spoken(text))


def formats_of(text: str, call: Call) -> tuple[CallFormat, ...]:
    """The forms in which ``text`` asks for ``call`` and nothing else.

    >>> formats_of('{"name": "add", "parameters": {"a": 1}}', Call("add", {"a": 1}))
    ('llama',)
    """
    return tuple(form for form in _READERS if find_calls(text, form) == [call])


def formats_marked(template: str) -> tuple[CallFormat, ...]:
    """The forms whose marks stand in a chat template."""
    return tuple(form for form, mark in _MARKS.items() if mark in template)


def example_call(form: CallFormat) -> str:
    """How a call looks, for the instructions."""
    return _EXAMPLES[form]


def _hermes(text: str) -> list[Call | BadCall]:
    return [_parse(found) for found in _TAG.findall(text)]


def _fenced(text: str) -> list[Call | BadCall]:
    """Blocks that name a function; other JSON is an answer's own business."""
    return [_parse(found) for found in _FENCE.findall(text) if '"name"' in found]


def _llama(text: str) -> list[Call | BadCall]:
    marked = _PYTHON in text
    body = text.rpartition(_PYTHON)[2].strip()
    if not marked and not (body.startswith("{") and '"name"' in body):
        return []
    return [_parse(part) for part in _objects(body)]


def _objects(body: str) -> Iterable[str]:
    """Llama separates several calls by semicolons between objects."""
    return re.split(r"(?<=\})\s*;\s*(?=\{)", body)


_READERS: Final[dict[CallFormat, Callable[[str], list[Call | BadCall]]]] = {
    "hermes": _hermes,
    "llama": _llama,
    "fenced": _fenced,
}
_EXAMPLES: Final[dict[CallFormat, str]] = {
    "hermes": '<tool_call>{"name": NAME, "arguments": {...}}</tool_call>',
    "llama": '{"name": NAME, "parameters": {...}}',
    "fenced": '```json\n{"name": NAME, "arguments": {...}}\n```',
}


def _parse(text: str) -> Call | BadCall:
    if len(text) > _MAX_TEXT:
        return BadCall(f"a tool call must have at most {_MAX_TEXT} characters")
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return BadCall("a tool call must be one JSON object")
    if not isinstance(value, dict):
        return BadCall("a tool call must be one JSON object")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return BadCall('a tool call needs a "name"')
    arguments = value.get("arguments", value.get("parameters", {}))
    if _is_deep(arguments, _MAX_DEPTH):
        return BadCall(f"arguments must be nested at most {_MAX_DEPTH} deep")
    return Call(name, arguments)


def _is_deep(value: object, most: int) -> bool:
    """Whether lists and tables lie deeper in each other."""
    layer = [value]
    for _ in range(most):
        layer = [
            inner
            for one in layer
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, dict | list) for one in layer)


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON")
