"""What the database gives back: one frozen record per stored thing."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field

from gruppo.record import codec
from gruppo.types import Failure, Finish, Interaction, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a health rule found after ``step``. ``detail`` is plain JSON (values, suggestion)."""

    step: int
    id: str
    severity: str
    detail: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened after ``step``; ``time`` in seconds since 1970 (UTC)."""

    time: float
    step: int
    kind: str
    detail: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Per-token values of a completion, each [n], logp and advantage rounded to float32.

    ``advantage`` is None if the step's credit gave one number per completion.
    """

    ids: tuple[int, ...]
    logp: tuple[float, ...]
    mask: tuple[bool, ...]
    advantage: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCompletion:
    """A completion with its problem and score. ``row`` is its position within its group.

    ``advantage`` is the mean over trained tokens if there was one per token, and None if the step
    had none. ``version`` is the policy's at the oldest token. ``tokens`` is None if the run was
    told not to store tokens. ``parts`` are raw values, ``counted`` what counted in the place of
    those that a clip or gate changed.
    """

    step: int
    group: int
    row: int
    problem: str
    source: str
    prompt: tuple[Message, ...]
    answer: str | None
    text: str
    num_tokens: int
    tokens: Tokens | None
    version: int | None
    advantage: float | None
    total: float | None
    task: float | None
    parts: Mapping[str, float | None]
    finish: Finish
    failure: Failure | None
    interaction: Interaction | None = None
    counted: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSample:
    """One completion of an evaluation after ``step``."""

    step: int
    problem: str
    source: str
    prompt: tuple[Message, ...]
    answer: str | None
    text: str
    total: float | None
    task: float | None
    finish: Finish


COMPLETIONS = (
    "SELECT c.*, g.problem, g.source, g.prompt, g.answer FROM completions c "
    "JOIN groups g ON g.step = c.step AND g.group_index = c.group_index"
)
IN_ORDER = "ORDER BY c.step, c.group_index, c.row"


def completion_from(row: sqlite3.Row) -> StoredCompletion:
    """Make the record of one row of the `COMPLETIONS` query."""
    return StoredCompletion(
        step=row["step"],
        group=row["group_index"],
        row=row["row"],
        problem=codec.unpack_text(row["problem"]),
        source=codec.unpack_text(row["source"]),
        prompt=codec.unpack_messages(row["prompt"]),
        answer=codec.unpack_optional(row["answer"]),
        text=codec.unpack_text(row["text"]),
        num_tokens=row["num_tokens"],
        tokens=_tokens_from(row),
        version=row["version"],
        advantage=row["advantage"],
        total=row["total"],
        task=row["task"],
        parts=json.loads(row["parts"]),
        finish=row["finish"],
        failure=codec.unpack_failure(row["failure"]),
        interaction=codec.unpack_interaction(_column(row, "interaction")),
        counted=json.loads(_column(row, "counted") or "{}"),
    )


def _column(row: sqlite3.Row, name: str) -> str | None:
    """A column that files of earlier versions, opened to be read, have not."""
    return row[name] if name in row.keys() else None  # noqa: SIM118 (a row is no mapping)


def sample_from(row: sqlite3.Row) -> StoredSample:
    """Make the record of one row of the samples table."""
    return StoredSample(
        step=row["step"],
        problem=codec.unpack_text(row["problem"]),
        source=codec.unpack_text(row["source"]),
        prompt=codec.unpack_messages(row["prompt"]),
        answer=codec.unpack_optional(row["answer"]),
        text=codec.unpack_text(row["text"]),
        total=row["total"],
        task=row["task"],
        finish=row["finish"],
    )


def _tokens_from(row: sqlite3.Row) -> Tokens | None:
    if row["tokens"] is None:
        return None
    advantage = row["token_advantage"]
    return Tokens(
        ids=codec.unpack_ints(row["tokens"]),
        logp=codec.unpack_floats(row["logp"]),
        mask=codec.unpack_bools(row["mask"]),
        advantage=None if advantage is None else codec.unpack_floats(advantage),
    )
