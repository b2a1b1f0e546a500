"""Task sets of the ``verifiers`` library (extra ``verifiers``): the prompts.

By themselves they are of one turn: the tasks here, their reward functions in the reward kind
``verifiers``. What the library would run around a completion is not run then, so a task set that
needs it is refused. With ``episodes`` they are played by the environment kind ``verifiers``, which
runs tools and an environment's own turns, and refuses the rest (a machine, other agents).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from itertools import islice
from typing import Any, ClassVar, Literal

from gruppo.data.prompting import Prompting
from gruppo.data.rows import Columns, Reader, Row, Shape, collect
from gruppo.types import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifiers:
    """A task set of verifiers 0.4, rewarded by the reward kind ``verifiers``; see ``episodes``.

    ``info["verifiers"]`` is the task as data; there is no reference answer, because the task set
    keeps what it compares with to itself.

    Args:
        taskset: the installed package or module, as verifiers names it.
        size: how many tasks, from the first; None for all.
        options: its settings, those of its tasks under ``task``.
        system: text of a system message for tasks that have none.
        label: name of the data set in metrics; ``taskset`` if None.
        episodes: the environment kind ``verifiers`` plays the tasks, and rewards them.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["verifiers"] = "verifiers"
    taskset: str
    size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    label: str | None = None
    episodes: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: {self.size} must be at least 1")

    def load(self) -> list[Problem]:
        """Import the task set and read its tasks.

        Raises:
            ValueError: verifiers is missing, the task set cannot be made, needs more than a turn of
                the policy, or has a task that is no text.
        """
        try:
            import verifiers.v1 as vf  # pyrefly: ignore[missing-import]
        except ImportError:
            raise ValueError(
                f'{self.taskset}: task sets need verifiers; pip install "gruppo[verifiers]"'
            ) from None
        try:
            kind = vf.taskset_config_type(self.taskset)
            tasks = vf.load_taskset(kind.model_validate({**self.options, "id": self.taskset}))
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"taskset: {self.taskset!r} cannot be made: {error}") from error
        if self.size is None and not tasks.bounded:
            raise ValueError(f"size: {self.taskset!r} has no last task; say how many to take")
        if not self.episodes and (needs := _needs(vf, self.taskset, tasks)):
            raise ValueError(
                f"taskset: {self.taskset!r} needs {needs}, which is not run here: only single "
                "turns that are graded by their text can be taken; tools and turns of an "
                "environment with episodes = true and an environment of kind verifiers"
            )
        shape = Shape(columns=Columns(answer=None), prompting=Prompting(system=self.system))
        rows = self._rows(islice(tasks, self.size))
        return collect(rows, shape.read, path=self.taskset, source=self.label or self.taskset)

    def _rows(self, tasks: Iterator[Any]) -> Iterator[tuple[str, Reader]]:
        for number, task in enumerate(tasks, start=1):
            yield f"task {number}", lambda task=task: (self._row(task), dict)

    def _row(self, task: Any) -> Row:
        if not self.episodes and (missing := _missing(task)):
            raise ValueError(missing)
        given, system = task.data.prompt, task.data.system_prompt
        chat = [{"role": "system", "content": system}] if system else []
        if isinstance(given, str):
            chat.append({"role": "user", "content": given})
        else:
            chat += [{"role": m.role, "content": m.content} for m in given or ()]
        data = task.data.model_dump(mode="json", exclude_defaults=True)
        task.data_type().model_validate(data)  # as the reward's worker will make it again
        kept = {"taskset": self.taskset, "options": dict(self.options), "data": data}
        if self.episodes:
            kept["episodes"] = True
        return {"question": chat, "verifiers": kept}


def _needs(vf: Any, name: str, tasks: Any) -> str | None:
    """What a task set needs beyond a turn of the policy, None if nothing."""
    kind, config = tasks.task_type(), tasks.config
    if vf.environment_class(name) is not vf.SingleAgentEnv:
        return "an environment of its own"
    if vf.default_harness_id(name) == name:
        return "a program of its own (a harness)"
    if kind.NEEDS_CONTAINER:
        return "a container"
    if kind.toolsets(config.task) or type(tasks).toolsets(config):
        return "tool servers"
    if kind.setup is not vf.Task.setup or kind.finalize is not vf.Task.finalize:
        return "a machine to set up"
    return None


def _missing(task: Any) -> str | None:
    """Why a task cannot be rewarded by a text alone, None if it can."""
    judges = [judge.score for judge in task.plugged_judges()]
    rewards = [*task.hooks("reward"), *judges]
    if not rewards:
        return "has no reward function"
    given = [signature(reward).parameters.get("runtime") for reward in rewards]
    if any(one is not None and one.default is Parameter.empty for one in given):
        return "a reward function reads files of the machine that the policy worked on (runtime)"
    return "has skills for a program" if task.data.skills else None
