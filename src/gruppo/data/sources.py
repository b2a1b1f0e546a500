"""Where problems come from: one frozen record a kind of source, each with ``load()``.

A record holds settings only; nothing is opened before ``load()``. Libraries that a source needs
beyond the core are imported there, with the extra named if they are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

from gruppo.data import jsonl, parquet
from gruppo.data.prompting import Prompting
from gruppo.data.rows import Columns, Draft, Reader, Row, Shape, collect, look_up
from gruppo.data.split import SPLIT_KEY, Problems
from gruppo.data.streamed import StreamedProblems
from gruppo.data.tasks import TASKS
from gruppo.data.tasks.base import Item, Task
from gruppo.data.verifiers import Verifiers
from gruppo.types import Problem

_FORBID = {"extra": "forbid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Jsonl:
    """A JSON Lines file, read strictly: a bad row is told by file, line and field.

    Args:
        path: the file.
        columns: which column is what; all others go to ``Problem.info``.
        prompting: how a row becomes a prompt.
        streaming: keep only where rows start, for files larger than memory. Each start and resume
            reads all of it a few times: its rows, lengths of prompts, and ids are checked.
        label: name of the data set in metrics; the file's name without ending if None.
    """

    __pydantic_config__: ClassVar = _FORBID

    kind: Literal["jsonl"] = "jsonl"
    path: str
    columns: Columns = field(default_factory=Columns)
    prompting: Prompting = field(default_factory=Prompting)
    streaming: bool = False
    label: str | None = None

    def load(self) -> Problems:
        """Read the file: a list, or rows on demand with ``streaming``.

        Raises:
            ValueError: if a row or the whole file is bad; never a part of the data.
            OSError: if the file is not there or cannot be read.
        """
        path = Path(self.path).expanduser()
        shape = Shape(columns=self.columns, prompting=self.prompting)
        source = self.label or path.stem
        if self.streaming:
            return StreamedProblems(path, shape=shape, source=source)
        return collect(jsonl.readers(path), shape.read, path=str(path), source=source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parquet:
    """A Parquet file (extra ``parquet``).

    ``path``, ``columns``, ``prompting`` and ``label`` as in `Jsonl`.
    """

    __pydantic_config__: ClassVar = _FORBID

    kind: Literal["parquet"] = "parquet"
    path: str
    columns: Columns = field(default_factory=Columns)
    prompting: Prompting = field(default_factory=Prompting)
    label: str | None = None

    def load(self) -> list[Problem]:
        """Read the file.

        Raises:
            ValueError: if a row or the whole file is bad, or pyarrow is missing.
            OSError: if the file is not there or cannot be read.
        """
        path = Path(self.path).expanduser()
        shape = Shape(columns=self.columns, prompting=self.prompting)
        return collect(
            parquet.readers(path), shape.read, path=str(path), source=self.label or path.stem
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verl:
    """A Parquet file in verl's layout (extra ``parquet``), which needs no column mapping.

    ``prompt`` is the chat, ``reward_model.ground_truth`` the answer (None unless it is text or a
    number: tests of a program, say, stay in ``info``), ``data_source`` names the data set in
    metrics; ``info`` keeps all columns but the prompt, as verl's reward functions expect them.

    Args:
        path: the file.
        system: text of a system message for prompts that have none.
        label: name of the data set in metrics instead of ``data_source``.
    """

    __pydantic_config__: ClassVar = _FORBID

    kind: Literal["verl"] = "verl"
    path: str
    system: str | None = None
    label: str | None = None

    def load(self) -> list[Problem]:
        """Read the file.

        Raises:
            ValueError: if a row or the whole file is bad, or pyarrow is missing.
            OSError: if the file is not there or cannot be read.
        """
        path = Path(self.path).expanduser()
        rows = parquet.readers(path)
        problems = collect(rows, self._read, path=str(path), source=self.label or path.stem)
        if self.label is not None:
            return problems
        return [replace(problem, source=str(problem.info["data_source"])) for problem in problems]

    def _read(self, row: Row, exact: Callable[[], Row]) -> Draft:
        del exact  # Parquet's numbers have no text of their own
        columns = Columns(question="prompt", answer="reward_model.ground_truth")
        if self.label is None:
            look_up(row, "data_source")
        truth = look_up(row, "reward_model.ground_truth")
        if isinstance(truth, bool) or not isinstance(truth, str | int | float):
            columns = replace(columns, answer=None)
        if not isinstance(look_up(row, "prompt"), list):
            raise ValueError("field 'prompt': is not a list of messages; verl's layout has a chat")
        shape = Shape(columns=columns, prompting=Prompting(system=self.system))
        return shape.read(row, lambda: row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """A data set of the Hugging Face hub, or a local folder in its layout (extra ``hub``).

    The ``datasets`` library guesses types when it reads text formats: a date string may become a
    date, a long integer a float. Where that matters, download the file and use `Jsonl`.

    Args:
        name: name on the hub ("openai/gsm8k").
        split: which split.
        config: which configuration, if it has several.
        revision: commit or tag; pin it for runs that must be repeatable.
        columns: which column is what.
        prompting: how a row becomes a prompt.
        label: name of the data set in metrics; ``name`` if None.
    """

    __pydantic_config__: ClassVar = _FORBID

    kind: Literal["hub"] = "hub"
    name: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    columns: Columns = field(default_factory=Columns)
    prompting: Prompting = field(default_factory=Prompting)
    label: str | None = None

    def load(self) -> list[Problem]:
        """Download (or find in the cache) and read.

        Raises:
            ValueError: if a row is bad, or ``datasets`` is missing.
            OSError: if the hub cannot be reached or has no such data set.
        """
        try:
            import datasets  # pyrefly: ignore[missing-import]
        except ImportError:
            raise ValueError(
                f'{self.name}: hub data sets need datasets; pip install "gruppo[hub]"'
            ) from None
        rows = datasets.load_dataset(
            self.name, self.config, split=self.split, revision=self.revision
        )
        shape = Shape(columns=self.columns, prompting=self.prompting)
        label = self.label or self.name
        return collect(_plain_readers(rows), shape.read, path=self.name, source=label)


# Its items differ between two runs with one seed, so no run could be resumed or repeated.
_UNREPEATABLE = ("codeio",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gym:
    """A task of reasoning-gym (extra ``gym``).

    ``info["entry"]`` is the task's own entry, which its scoring function takes; ``info["task"]``
    names the task.

    Args:
        task: its name ("letter_counting").
        size: how many problems are generated.
        seed: another seed gives others.
        options: settings of the task.
        prompting: how the question becomes a prompt.
        label: name of the data set in metrics; the task's name if None.
    """

    __pydantic_config__: ClassVar = _FORBID

    kind: Literal["gym"] = "gym"
    task: str
    size: int = 1000
    seed: int = 0
    options: Mapping[str, object] = field(default_factory=dict)
    prompting: Prompting = field(default_factory=Prompting)
    label: str | None = None

    def __post_init__(self) -> None:
        _check_size(self.size)
        if self.task in _UNREPEATABLE:
            raise ValueError(f"task: {self.task!r} differs from run to run; choose another")

    def load(self) -> list[Problem]:
        """Generate the problems.

        Raises:
            ValueError: if there is no such task or setting, or reasoning-gym is missing.
        """
        try:
            import reasoning_gym  # pyrefly: ignore[missing-import]
        except ImportError:
            raise ValueError(
                f'{self.task}: gym tasks need reasoning-gym; pip install "gruppo[gym]"'
            ) from None
        try:
            entries = reasoning_gym.create_dataset(
                self.task, size=self.size, seed=self.seed, **self.options
            )
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"task: {self.task!r}: {error}; see reasoning-gym's list") from None
        rows = (
            {"question": e["question"], "answer": e["answer"], "task": self.task, "entry": dict(e)}
            for e in (entries[index] for index in range(self.size))
        )
        columns = Columns(answer=None)
        shape = Shape(columns=columns, prompting=self.prompting)
        label = self.label or self.task
        problems = collect(_plain_readers(rows), shape.read, path=self.task, source=label)
        return [_gym_answer(problem) for problem in problems]


def _gym_answer(problem: Problem) -> Problem:
    """Move the answer out of ``info``; a few tasks have none, because many answers are right."""
    info = dict(problem.info)
    answer = info.pop("answer")
    return replace(problem, answer=None if answer is None else str(answer), info=info)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """An own task, generated here (see `gruppo.data.tasks.TASKS`).

    Args:
        name: the task.
        size: how many problems are generated.
        seed: another seed gives others.
        distinct: leave out a problem whose question came before (there are then fewer than size).
        options: settings of the task, such as ``{"operations": ["add"], "high": 20}``.
        prompting: how the question becomes a prompt; ``info`` columns can be placeholders.
        label: name of the data set in metrics; the task's name if None.

    >>> source = TaskSource(name="arithmetic", size=2, options={"operations": ["+"]})
    >>> [(p.id, p.prompt[0].content, p.answer) for p in source.load()]
    [('arithmetic/0/0', '5 + 3', '8'), ('arithmetic/0/1', '7 + 3', '10')]
    """

    __pydantic_config__: ClassVar = _FORBID

    kind: Literal["task"] = "task"
    name: str
    size: int = 4000
    seed: int = 0
    distinct: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    prompting: Prompting = field(default_factory=Prompting)
    label: str | None = None

    def __post_init__(self) -> None:
        _check_size(self.size)
        self.task()

    def task(self) -> Task:
        """Make the task's record.

        Raises:
            ValueError: if there is no such task or setting, or a setting's value is refused.
        """
        if self.name not in TASKS:
            raise ValueError(f"name: {self.name!r} is no task; use one of {', '.join(TASKS)}")
        make = TASKS[self.name]
        defaults = {option.name: option.default for option in fields(make)}
        settings = {}
        for option, given in self.options.items():
            if option not in defaults:
                raise ValueError(
                    f"options: {self.name} has no {option!r}; it has {', '.join(defaults)}"
                )
            value = tuple(given) if isinstance(given, list) else given
            if type(value) is not type(defaults[option]):
                raise ValueError(
                    f"options: {option} = {given!r} is of the wrong type; write it like "
                    f"{defaults[option]!r}"
                )
            settings[option] = value
        return make(**settings)

    def load(self) -> list[Problem]:
        """Generate the problems; ``id`` is "name/seed/index".

        Raises:
            ValueError: if the prompt template names a column that the task has not.
        """
        task, label = self.task(), self.label or self.name
        items = {index: task(self.seed, index) for index in range(self.size)}
        if self.distinct:
            # later ones first, so that the earliest of equal questions stays
            last = {items[index].question: index for index in reversed(items)}
            items = {index: items[index] for index in sorted(last.values())}
        return [
            self._problem(item, f"{self.name}/{self.seed}/{index}", label)
            for index, item in items.items()
        ]

    def _problem(self, item: Item, name: str, label: str) -> Problem:
        return Problem(
            id=name,
            prompt=self.prompting({**item.info, "question": item.question}),
            answer=item.answer,
            info={**item.info, SPLIT_KEY: list(item.keys)},
            source=label,
        )


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size: {size} must be at least 1")


def _plain_readers(rows: Iterable[Row]) -> Iterator[tuple[str, Reader]]:
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", lambda row=row: (row, lambda: row)


DataSource = Jsonl | Parquet | Verl | Hub | Gym | Verifiers | TaskSource


def load(source: DataSource) -> Problems:
    """Load the problems of any source: ``source.load()``."""
    return source.load()
