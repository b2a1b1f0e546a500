"""Environments written for TRL's ``environment_factory`` (TRL 1.16): classes of tool methods.

Such a class has ``reset(**row)``, which may return a text that ends the prompt; its other public
methods are tools; ``get_reward()``, if there is one, judges the episode. One object serves one
episode at a time and is reset and used again. An exception of a method is told to the policy, as
TRL does. An object whose method still runs when its episode is closed is not used again. Texts
only: no images, and one class for all rows.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, ClassVar, Literal, final

from gruppo.environment.base import ToolError
from gruppo.environment.calls import CallFormat
from gruppo.environment.tools import Tool, ToolEpisode, check_result_size, instructions, no_reward
from gruppo.types import Message, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlEnvironment:
    """An environment of objects that ``factory`` makes. ``calls``, ``max_result`` as in `Toolbox`.

    Raises:
        ValueError: the class has no ``reset`` or no tools, or a method cannot be a tool.
    """

    factory: Callable[[], object]
    calls: CallFormat = "hermes"
    max_result: int = 2000
    _free: list[object] = field(default_factory=list, repr=False, compare=False)
    _said: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_result_size(self.max_result)
        made = self.factory()
        if "reset" not in _methods(made):
            raise ValueError(f"{_class(made)} has no method reset, which TRL's environments need")
        if not _tools(made):
            raise ValueError(f"{_class(made)} has no public method besides reset: no tool to call")
        self._free.append(made)

    @property
    def tools(self) -> tuple[Mapping[str, object], ...]:
        """JSON schemas of the methods."""
        return tuple(tool.schema for tool in self._known())

    @property
    def instructions(self) -> str:
        """The same in words."""
        return instructions(self._known(), self.calls)

    def prompt(self, problem: Problem) -> tuple[Message, ...]:
        """The problem's prompt with what ``reset`` says at its end."""
        made = self._take()
        said = _reset(made, problem)
        self._free.append(made)
        prompt = _with(problem.prompt, said)
        self._said[_key(replace(problem, prompt=prompt))] = len(said or "")
        return prompt

    def start(self, problem: Problem) -> ToolEpisode:
        """Reset an object for an episode on ``problem``, whose prompt `prompt` has made.

        Raises:
            ValueError: ``reset`` says another thing than in the prompt.
        """
        made = self._take()
        said = _reset(made, self._asked(problem))
        if said and not problem.prompt[-1].content.endswith(said):
            raise ValueError(
                f"{_class(made)}.reset says {said!r:.80}, and said something else when the prompt "
                "was made: it must depend on its arguments alone"
            )
        judge = _methods(made).get("get_reward")
        loan = _Loan(lambda: self._free.append(made))
        return ToolEpisode(
            tools={tool.name: replace(tool, run=loan.guarded(tool.run)) for tool in _tools(made)},
            calls=self.calls,
            max_result=self.max_result,
            judge=loan.guarded(_waited(judge)) if judge else no_reward,
            end=loan.end,
        )

    def _asked(self, problem: Problem) -> Problem:
        """``problem`` with the prompt that it had before ``reset`` first spoke."""
        said = self._said.get(_key(problem), 0)
        if not said:
            return problem
        last = problem.prompt[-1]
        bare = replace(last, content=last.content[:-said])
        return replace(problem, prompt=(*problem.prompt[:-1], bare))

    def _take(self) -> object:
        try:  # episodes are started in several threads
            return self._free.pop()
        except IndexError:
            return self.factory()

    def _known(self) -> list[Tool]:
        made = self._take()
        self._free.append(made)
        return _tools(made)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trl:
    """The TRL environment class ``factory`` ("package.module:NAME"), called with ``options``.

    ``calls`` is how calls are written ("hermes", "llama" or "fenced": what the chat template
    shows), ``max_result`` the most characters of a result.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["trl"] = "trl"
    factory: str
    options: Mapping[str, Any] = field(default_factory=dict)
    calls: CallFormat = "hermes"
    max_result: int = 2000

    def __post_init__(self) -> None:
        check_result_size(self.max_result)
        self.open()

    def open(self) -> TrlEnvironment:
        """Import the class. Raises ValueError if that fails, or it is no such class."""
        module_name, _, name = self.factory.partition(":")
        try:
            found = vars(importlib.import_module(module_name))[name]
        except (ImportError, ValueError, KeyError) as error:
            raise ValueError(
                f"factory = {self.factory!r}: cannot be imported ({error}); write "
                "package.module:NAME and make sure that it is installed or on PYTHONPATH"
            ) from error
        options = dict(self.options)
        return TrlEnvironment(
            factory=lambda: found(**options), calls=self.calls, max_result=self.max_result
        )


@final
class _Loan:
    """An object in use by one episode; given back at its end unless a call is still in it.

    A call that was not answered in time goes on in its thread, and would write to the next
    episode's object.
    """

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back = give_back
        self._lock = threading.Lock()
        self._inside = 0
        self._over = False

    def guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, counted while it runs, and refused once the episode is over."""

        @wraps(function)
        def call(*values: Any, **options: Any) -> Any:
            with self._lock:
                if self._over:
                    raise ToolError("the episode is over")
                self._inside += 1
            try:
                return function(*values, **options)
            finally:
                with self._lock:
                    self._inside -= 1

        return call

    def end(self) -> None:
        """The episode is over."""
        with self._lock:
            self._over = True
            if not self._inside:
                self._give_back()


def _key(problem: Problem) -> int:
    return hash((problem.source, problem.id, problem.prompt))


def _reset(made: object, problem: Problem) -> str | None:
    row = {**problem.info, "prompt": _plain(problem.prompt), "answer": problem.answer}
    said = _waited(_methods(made)["reset"])(**row)
    if said is None or isinstance(said, str):
        return said
    raise ValueError(f"{_class(made)}.reset gave {type(said).__name__}; only text can be shown")


def _plain(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _with(prompt: tuple[Message, ...], said: str | None) -> tuple[Message, ...]:
    if not said:
        return prompt
    last = prompt[-1]
    return (*prompt[:-1], replace(last, content=last.content + said))


def _methods(made: object) -> dict[str, Callable[..., Any]]:
    """The public methods of the object's class, bound; properties are not touched."""
    functions = inspect.getmembers(type(made), predicate=inspect.isfunction)
    return {n: f.__get__(made) for n, f in functions if not n.startswith("_")}


def _tools(made: object) -> list[Tool]:
    bound = _methods(made)
    return [
        replace(Tool.of(method), run=_waited(method))
        for name, method in bound.items()
        if name not in ("reset", "get_reward")
    ]


def _waited(method: Callable[..., Any]) -> Callable[..., Any]:
    """A coroutine method as a plain one."""
    if not inspect.iscoroutinefunction(method):
        return method

    @wraps(method)
    def call(*values: Any, **options: Any) -> Any:
        return asyncio.run(method(*values, **options))

    return call


def _class(made: object) -> str:
    return type(made).__name__
