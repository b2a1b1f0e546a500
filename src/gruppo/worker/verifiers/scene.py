"""An environment of the library, and whether its episodes can be played here.

They can where the policy is the only agent and a chat with tools is all that it needs. What needs
a machine, a program around the model, or a server that stands elsewhere is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, get_origin, get_type_hints

import verifiers.v1 as vf  # pyrefly: ignore[missing-import]
from verifiers.v1.utils.decorators import (  # pyrefly: ignore[missing-import]
    discover_decorated,
)

from gruppo.worker.verifiers.tools import Tools


class Refused(ValueError):
    """What an environment needs and does not get here."""

    def __init__(self, needs: str) -> None:
        super().__init__(f"needs {needs}, which is not run here")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The environment, the class of its tasks, and the settings that they share."""

    env: Any
    task: Any
    config: Any

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> Scene:
        """Make the environment of task set ``name``.

        Raises:
            Refused: it needs what is not here.
        """
        config = vf.resolve_env_config({**settings, "taskset": {**options, "id": name}})
        env = vf.load_environment(config)
        scene = cls(env=env, task=type(env.taskset).task_type(), config=env.taskset.config.task)
        if vf.default_harness_id(name) == name:
            raise Refused("a program of its own (a harness)")
        scene._check_agents()
        scene._check_task()
        return scene

    def toolsets(self) -> tuple[list[Any], list[Any]]:
        """New tool sets: those of the task set, and those of a task."""
        shared = type(self.env.taskset).toolsets(self.env.taskset.config)
        return list(shared), list(self.task.toolsets(self.config))

    async def schemas(self) -> list[dict[str, Any]]:
        """Of all tools, as a chat template takes them."""
        shared, own = self.toolsets()
        return (await Tools.of([*shared, *own])).schemas

    def make(self, data: Mapping[str, Any]) -> Any:
        """The task of ``data``. Raises Refused for one that needs what is not here."""
        task = self.task(self.task.data_type().model_validate(data), self.config)
        hooks = [hook for name in ("reward", "metric") for hook in task.hooks(name)]
        if any(map(_needs_runtime, [*hooks, *(judge.score for judge in task.plugged_judges())])):
            raise Refused("rewards that read files of the policy's machine (runtime)")
        if any(map(_at_boundary, task.hooks("stop"))) or discover_decorated(task, "intercept"):
            raise Refused("requests and responses of a model's server, to stop or to change them")
        if task.data.skills:
            raise Refused("skills for a program")
        return task

    def _check_agents(self) -> None:
        seats = [seat for _, seat in self.env.config if isinstance(seat, vf.AgentConfig)]
        if len(seats) != 1:
            raise Refused(f"{len(seats)} agents")
        if seats[0].harness is not None and seats[0].harness.id != "null":
            raise Refused(f"the program (harness) {seats[0].harness.id!r}")

    def _check_task(self) -> None:
        if self.task.NEEDS_CONTAINER:
            raise Refused("a container")
        own = [self.task.setup != vf.Task.setup, self.task.finalize != vf.Task.finalize]
        hooks = [self.task.setup, self.task.finalize]
        if any(one and _needs_runtime(hook) for one, hook in zip(own, hooks, strict=True)):
            raise Refused("a machine to set up (runtime)")
        shared, each = self.toolsets()
        for made in [*shared, *each]:
            config = made.config.model_dump()
            local = config.get("runtime", {}).get("type", "subprocess") == "subprocess"
            if config.get("url") or config.get("colocated") or not local:
                raise Refused(f"the tools {made.server_name!r} elsewhere than in this process")


async def called(hook: Callable[..., Any], **offered: Any) -> Any:
    """Call ``hook`` with those of ``offered`` that it names, and wait for it."""
    names = signature(hook).parameters
    result = hook(**{name: value for name, value in offered.items() if name in names})
    return await result if inspect.isawaitable(result) else result


def plain(message: Any) -> list[dict[str, str]]:
    """A turn of the user (a text or messages) as messages of texts.

    Raises:
        Refused: one is no text.
    """
    if message is None:
        return []
    if isinstance(message, str):
        return [{"role": "user", "content": message}]
    found = [one if isinstance(one, dict) else one.model_dump() for one in message]
    if any(not isinstance(one.get("content"), str) for one in found):
        raise Refused("messages that are no texts")
    return [{"role": one["role"], "content": one["content"]} for one in found]


def _needs_runtime(hook: Callable[..., Any]) -> bool:
    found = signature(hook).parameters.get("runtime")
    return found is not None and found.default is Parameter.empty


def _at_boundary(hook: Callable[..., Any]) -> bool:
    hints = [get_origin(hint) or hint for hint in get_type_hints(hook).values()]
    return any(hint in (vf.Request, vf.Response) for hint in hints)
