"""From a row (columns by name) to a `Problem`: column mapping, ids, and the report of bad rows.

It reads no file: jsonl.py, parquet.py and sources.py bring the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from typing import ClassVar, NamedTuple, Protocol, final, runtime_checkable

from gruppo.data.keyed import hash64
from gruppo.data.prompting import Prompting, as_text
from gruppo.types import Message, Problem

MAX_REPORTED = 10
_REMEDY = "remove the column, or write it as text"
Row = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which column is what. A dotted name (``reward_model.ground_truth``) looks inside a table.

    Args:
        question: text, or a chat (a list of ``{"role", "content"}``).
        answer: the reference answer; None if the data have none.
        id: a unique and stable id; None to use a hash of question and answer.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    question: str = "question"
    answer: str | None = "answer"
    id: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("question", self.question), ("answer", self.answer), ("id", self.id)):
            if value is not None and not value.strip():
                raise ValueError(f"columns.{name}: is empty; name a column")


class Draft(NamedTuple):
    """A row that was understood, before it has an id. ``digest`` identifies its content."""

    prompt: tuple[Message, ...]
    answer: str | None
    id: str | None
    digest: int
    info: dict[str, object]

    def problem(self, source: str, occurrence: int = 1) -> Problem:
        """Make the problem; rows with equal content are told apart by their ``occurrence``."""
        name = self.id
        if name is None:
            name = f"{self.digest:016x}" + (f"-{occurrence}" if occurrence > 1 else "")
        return Problem(
            id=name, prompt=self.prompt, answer=self.answer, info=self.info, source=source
        )


def look_up(row: Row, column: str) -> object:
    """Value of ``column``, by its whole name or along its dots.

    Raises:
        ValueError: naming the column and those that the row has.
    """
    if column in row:
        return row[column]
    value: object = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            have = ", ".join(map(repr, row)) or "none"
            raise ValueError(
                f"field {column!r}: missing; this row has {have}; map the right column"
            )
        value = value[name]
    return value


def read_messages(value: Sequence[object]) -> tuple[Message, ...]:
    """Read a chat: a list of ``{"role": text, "content": text}`` that does not end in an answer.

    Raises:
        ValueError: saying which message is wrong.
    """
    messages = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, Mapping):
            raise ValueError(f'message {number} is not a table with "role" and "content"')
        role, content = item.get("role"), item.get("content")
        if not isinstance(role, str) or not isinstance(content, str) or not role:
            raise ValueError(f'message {number} needs "role" and "content", both text')
        messages.append(Message(role, content))
    if not messages:
        raise ValueError("is an empty list; write at least one message")
    if messages[-1].role == "assistant":
        raise ValueError("ends with the assistant's turn; a prompt must leave that to the policy")
    return tuple(messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How rows become problems: the column mapping and the prompt."""

    columns: Columns
    prompting: Prompting

    def read(self, row: Row, exact: Callable[[], Row]) -> Draft:
        """Read one row.

        Args:
            row: its values.
            exact: gives the row with numbers as the text they were written in; asked for only
                when a number is used as text, so that nothing is rounded or reformatted.

        Raises:
            ValueError: "field ...: what is wrong; the fix".
        """
        question = look_up(row, self.columns.question)
        answer = self._text(row, exact, self.columns.answer)
        name = self._text(row, exact, self.columns.id)
        if isinstance(question, list | tuple):
            content, prompt = self._chat(question)
        else:
            content = (self._required(row, exact, self.columns.question),)
            used = exact() if self.prompting.template != "{question}" else {}
            prompt = self.prompting({**used, "question": content[0]})
        mapped = (self.columns.question, self.columns.answer, self.columns.id)
        info = {key: _kept(key, value) for key, value in row.items() if key not in mapped}
        digest = hash64(*content, "" if answer is None else answer)
        return Draft(prompt, answer, name, digest, info)

    def _chat(self, value: Sequence[object]) -> tuple[tuple[str, ...], tuple[Message, ...]]:
        try:
            messages = read_messages(value)
            prompt = self.prompting.chat(messages)
        except ValueError as error:
            raise ValueError(f"field {self.columns.question!r}: {error}") from None
        return tuple(part for m in messages for part in (m.role, m.content)), prompt

    def _text(self, row: Row, exact: Callable[[], Row], column: str | None) -> str | None:
        return None if column is None else self._required(row, exact, column)

    def _required(self, row: Row, exact: Callable[[], Row], column: str) -> str:
        value = look_up(row, column)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = look_up(exact(), column)
        try:
            text = as_text(value)
        except ValueError as error:
            raise ValueError(f"field {column!r}: {error}") from None
        if not text.strip():
            raise ValueError(f"field {column!r}: is empty; fill it or remove the row")
        return text


@runtime_checkable
class _Array(Protocol):
    """What NumPy's arrays and scalars have in common."""

    def tolist(self) -> object: ...


def as_json(value: object) -> object:
    """``value`` as JSON can hold it, because a problem may have to wait in a checkpoint.

    Times become ISO text, decimals their digits, arrays lists, sets sorted lists, NaN null.

    >>> as_json({"day": date(2024, 1, 2), "n": [Decimal("0.10"), float("nan")]})
    {'day': '2024-01-02', 'n': ['0.10', None]}

    Raises:
        ValueError: for bytes, infinities, tables whose keys are no text, and other objects.
    """
    match value:
        case list() | set() | frozenset():
            items = [as_json(item) for item in value]
            return items if isinstance(value, list) else sorted(items, key=repr)
        case tuple():  # JSON makes lists of them; a task's own checker may want its tuples
            return tuple(as_json(item) for item in value)
        case Mapping():
            kinds = (all(isinstance(key, kind) for key in value) for kind in (str, int))
            if not any(kinds):
                raise ValueError(f"holds a table whose keys are no text, as in JSON; {_REMEDY}")
            return {key: as_json(item) for key, item in value.items()}
        case _Array():
            return as_json(value.tolist())
        case _:
            return _scalar(value)


def _scalar(value: object) -> str | int | float | None:
    match value:
        case None | int() | str():
            return value
        case float() if not math.isinf(value):
            return None if math.isnan(value) else value
        case date() | time():
            return value.isoformat()
        case Decimal():
            return str(value)
    what = value if isinstance(value, float) else f"a {type(value).__name__}"
    raise ValueError(f"holds {what}, which JSON cannot; {_REMEDY}")


def _kept(column: str, value: object) -> object:
    try:
        return as_json(value)
    except ValueError as error:
        raise ValueError(f"field {column!r}: {error}") from None


@final
class Ids:
    """Counts equal contents and refuses equal ids, in the order of the rows."""

    __slots__ = ("_content", "_places")

    def __init__(self) -> None:
        self._content: dict[int, int] = {}
        self._places: dict[str, str] = {}

    def occurrence(self, draft: Draft, place: str) -> int:
        """How many rows up to this one, itself included, have its content (1 with an id column).

        Raises:
            ValueError: if the id column repeats an id.
        """
        if draft.id is None:
            count = self._content.get(draft.digest, 0) + 1
            self._content[draft.digest] = count
            return count
        if draft.id in self._places:
            raise ValueError(
                f"field 'id': {draft.id!r} was used before, on {self._places[draft.id]}; ids must "
                "be unique"
            )
        self._places[draft.id] = place
        return 1


@dataclass(slots=True)
class Report:
    """The bad rows of one file: all are counted, the first ones are told."""

    path: str
    rows: int = 0
    bad: int = 0
    told: list[str] = field(default_factory=list)

    def add(self, place: str, error: Exception) -> None:
        """Note that the row at ``place`` ("12" for a line, "row 12" elsewhere) is bad."""
        self.bad += 1
        if len(self.told) < MAX_REPORTED:
            self.told.append(f"{self.path}:{place}: {error}")

    def close(self) -> None:
        """Refuse the file if a row was bad, or if there was none.

        Raises:
            ValueError: with up to ten bad rows, one a line.
        """
        if self.bad:
            more = self.bad - len(self.told)
            tail = [f"... and {more} more"] if more else []
            head = f"{self.path}: {self.bad} of {self.rows} rows cannot be used"
            raise ValueError("\n".join([head, *self.told, *tail]))
        if not self.rows:
            raise ValueError(f"{self.path}: holds no rows; name a file with at least one")


Reader = Callable[[], tuple[Row, Callable[[], Row]]]
Read = Callable[[Row, Callable[[], Row]], Draft]


def collect(
    rows: Iterable[tuple[str, Reader]], read: Read, *, path: str, source: str
) -> list[Problem]:
    """Make problems of all rows, or none: a bad row refuses the whole set, after reading it all.

    Args:
        rows: place of each row, and a function that parses it to (row, exact).
        read: how (row, exact) becomes a draft, as `Shape.read`.
        path: what to call the data in errors.
        source: name of the data set, for metrics.

    Raises:
        ValueError: as `Report.close`.
    """
    report, ids, problems = Report(path), Ids(), []
    for place, reader in rows:
        report.rows += 1
        try:
            draft = read(*reader())
            problems.append(draft.problem(source, ids.occurrence(draft, place)))
        except ValueError as error:
            report.add(place, error)
    report.close()
    return problems
