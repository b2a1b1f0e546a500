"""Tools: typed Python functions that the policy calls, and the environment made of some.

A turn without a call ends the episode. A call that is malformed, unknown, or makes its tool raise
is the policy's business: it is answered with an error, and the episode goes on (were it unscored
instead, a policy could learn to break its tools where it would lose). The environment's fault are
ServiceError, and OSError of kinds that no argument brings about: a full disk, a lost connection.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Final, Protocol, runtime_checkable

from gruppo.environment.base import Reply, ToolError
from gruppo.environment.calls import BadCall, Call, CallFormat, example_call, find_calls
from gruppo.environment.schema import mistake_in
from gruppo.errors import ServiceError
from gruppo.types import Message, Problem

_CUT: Final = "\n[cut]"
MAX_CALLS: Final = 8
"""Calls of a turn that are run; further ones are answered with an error."""

_POLICYS: Final = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    TimeoutError,
)
"""What an argument can bring about: a path that is not there, a request that takes too long."""

_SECRETS: Final = (
    re.compile(
        r"(?i)(?<![a-z0-9])(?:(?:api|access|auth|secret)[_-]?)?"
        r"(?:key|token|secret|password|passwd|signature|sig)=[^\s&\"'<>]+"
    ),
    re.compile(r"(?i)\bbearer\s+[a-z0-9._~+/-]{8,}=*"),
    re.compile(r"(?<=://)[^\s/@\"']+:[^\s/@\"']+(?=@)"),
    re.compile(
        r"(?<![A-Za-z0-9_-])(?:sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}"
        r"|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,})"
    ),
)
"""What the text of an exception may give away of how a tool reaches its service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function with the JSON schema of its call."""

    name: str
    schema: Mapping[str, object]
    run: Callable[..., object]

    @classmethod
    def of(cls, function: Callable[..., object]) -> Tool:
        """The tool of a function with type hints and a Google-style docstring that has ``Args:``.

        Raises:
            ValueError: a hint or a description is missing, or a type has no JSON schema.
        """
        from transformers.utils import get_json_schema

        try:
            schema = get_json_schema(function)
        except Exception as error:  # of several classes, among them jinja's and its own
            raise ValueError(
                f"the function {function!r:.80} cannot be a tool: {error}. Give every argument a "
                'type hint and a line under "Args:" in the docstring'
            ) from error
        schema["function"].pop("return", None)  # templates show it, and the policy needs no type
        return cls(name=schema["function"]["name"], schema=schema, run=function)

    @property
    def parameters(self) -> Mapping[str, object]:
        """JSON schema of the arguments."""
        function = self.schema["function"]
        assert isinstance(function, dict), "a tool's schema has a function"
        return function["parameters"]

    def __call__(self, arguments: object) -> str:
        """Call the function. Raises ToolError for arguments that do not fit."""
        if wrong := mistake_in(arguments, self.parameters):
            raise ToolError(wrong)
        assert isinstance(arguments, dict), "checked"
        result = self.run(**arguments)
        return result if isinstance(result, str) else json.dumps(result, default=str)


@runtime_checkable
class Judge(Protocol):
    """What judges an episode when it is over."""

    def __call__(self) -> float | None:
        """The episode's reward, or None."""
        ...


def no_reward() -> None:
    """The judge of tools that have no opinion: the recipe's rewards grade the answer."""


def nothing_to_close() -> None:
    """Free nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolEpisode:
    """An episode in which ``tools`` are called; ``judge`` and ``end`` are asked at its end."""

    tools: Mapping[str, Tool]
    calls: CallFormat
    max_result: int
    judge: Judge = no_reward
    end: Callable[[], None] = nothing_to_close

    def reply(self, text: str, tokens: tuple[int, ...]) -> Reply:
        """Run the calls of a turn, in order; one message each."""
        found = find_calls(text, self.calls)
        answers = [self._answer(call) for call in found[:MAX_CALLS]]
        if len(found) > MAX_CALLS:
            answers.append((f"error: at most {MAX_CALLS} calls a turn", False))
        return Reply(
            messages=tuple(Message("tool", text) for text, _ in answers),
            calls=len(found),
            failed_calls=len(found) - sum(done for _, done in answers),
        )

    def reward(self) -> float | None:
        """What the judge says (numbers of other libraries as floats)."""
        said = self.judge()
        return float(said) if isinstance(said, Real) else said

    def close(self) -> None:
        """Free what the tools hold."""
        self.end()

    def _answer(self, call: Call | BadCall) -> tuple[str, bool]:
        """The text for the policy, and whether the call succeeded."""
        try:
            if isinstance(call, BadCall):
                raise ToolError(call.reason)
            if call.name not in self.tools:
                known = ", ".join(self.tools)
                raise ToolError(f"there is no tool {call.name[:80]!r}; there are: {known}")
            return told(self.tools[call.name](call.arguments), self.max_result), True
        except ServiceError:
            raise
        except ToolError as error:
            return told(f"error: {error}", self.max_result), False
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, _POLICYS):
                raise
            return told(f"error: {type(error).__name__}: {error}", self.max_result), False


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolbox:
    """An environment of ``items``, tools without memory: every call stands for itself.

    ``calls`` is how the policy writes calls (take what its chat template shows); a result of more
    than ``max_result`` characters is cut.

    Example:
        >>> def shout(text: str) -> str:
        ...     '''Turn text into capitals.
        ...
        ...     Args:
        ...         text: what to shout.
        ...     '''
        ...     return text.upper()
        >>> episode = Toolbox.of(shout).start(Problem(id="a", prompt=()))
        >>> call = '<tool_call>{"name": "shout", "arguments": {"text": "hi"}}</tool_call>'
        >>> episode.reply(call, ()).messages
        (Message(role='tool', content='HI'),)

    Raises:
        ValueError: no tools, two of one name, or a bound that is too small.
    """

    items: tuple[Tool, ...]
    calls: CallFormat = "hermes"
    max_result: int = 2000

    def __post_init__(self) -> None:
        check_result_size(self.max_result)
        names = [tool.name for tool in self.items]
        if not names:
            raise ValueError("items: give at least one tool")
        if len(set(names)) < len(names):
            raise ValueError(f"items: two tools of one name in {names}")

    @classmethod
    def of(cls, *functions: Callable[..., object], calls: CallFormat = "hermes") -> Toolbox:
        """Make one of functions with type hints and docstrings. Raises ValueError as `Tool.of`."""
        return cls(items=tuple(map(Tool.of, functions)), calls=calls)

    @property
    def tools(self) -> tuple[Mapping[str, object], ...]:
        """JSON schemas of the tools."""
        return tuple(tool.schema for tool in self.items)

    @property
    def instructions(self) -> str:
        """The tools in words."""
        return instructions(self.items, self.calls)

    def prompt(self, problem: Problem) -> tuple[Message, ...]:
        """The problem's own prompt."""
        return problem.prompt

    def start(self, problem: Problem) -> ToolEpisode:
        """An episode; the problem is not looked at."""
        tools = {tool.name: tool for tool in self.items}
        return ToolEpisode(tools=tools, calls=self.calls, max_result=self.max_result)


def check_result_size(max_result: int) -> None:
    """Refuse a bound under which no result could be told. Raises ValueError."""
    if max_result < 20:
        raise ValueError(f"max_result = {max_result}: must be at least 20 characters")


def told(text: str, most: int) -> str:
    """What the policy is told as a tool's result, in ``most`` characters.

    Errors lose what looks like a key or password in them.
    """
    shown = _hidden(text) if text.startswith("error: ") else text
    # half a surrogate pair is no text that could be encoded or recorded
    return _cut(shown.encode("utf-8", "replace").decode(), most)


def instructions(tools: Sequence[Tool], calls: CallFormat) -> str:
    """What the policy must know of ``tools`` and how to call them, as a system prompt says it."""
    return instructions_of([tool.schema for tool in tools], calls)


def instructions_of(schemas: Sequence[Mapping[str, object]], calls: CallFormat) -> str:
    """The same of tools by their schemas."""
    shown = "\n".join(json.dumps(schema["function"]) for schema in schemas)
    return (
        f"You can call these tools:\n{shown}\n"
        f"To call one, write {example_call(calls)} and end your turn; the result follows."
    )


def _hidden(text: str) -> str:
    for pattern in _SECRETS:
        text = pattern.sub("[redacted]", text)
    return text


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - len(_CUT)] + _CUT
