"""run.sqlite: every metric, group, completion, finding and event of a run.

One transaction per step: after a crash a step is there whole or not at all. The write-ahead log
lets a report or the web app read while the run writes. Rows newer than the checkpoint that a run
resumes from are dropped (`truncate_after`), so a resumed run records what an unbroken one does.
It draws no conclusions from what it stores.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from gruppo.record.codec import unpack_text
from gruppo.record.insert import (
    detail_text,
    insert_findings,
    insert_groups,
    insert_metrics,
    insert_samples,
)
from gruppo.record.rows import (
    COMPLETIONS,
    IN_ORDER,
    Event,
    Finding,
    StoredCompletion,
    StoredSample,
    completion_from,
    sample_from,
)
from gruppo.record.schema import STEP_TABLES, TABLES, UPGRADES, VERSION
from gruppo.types import Group

_APPLICATION = 0x47525055  # "GRPU": lets `file` and others tell whose database this is
_BUSY_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """How much of each step is stored; metrics always are, completions all by default.

    Attributes:
        every: Store groups and completions of every n-th step (1, 1 + n, ...) only.
        groups: Store at most so many groups of a step, the first ones; None: all.
        tokens: Store token ids, masks, log-probabilities and per-token advantages too. Text alone
            takes about a quarter of the space.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    every: int = 1
    groups: int | None = None
    tokens: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"record.every = {self.every}: give 1 (every step) or more")
        if self.groups is not None and self.groups < 0:
            raise ValueError(f"record.groups = {self.groups}: give 0 or more, or leave it out")


class Database:
    """The open database of one run. Close it, or use it in a ``with`` statement.

    Every method raises OSError, naming the file, when the disk or the file fails.
    """

    def __init__(
        self, path: Path, *, detail: Detail | None = None, read_only: bool = False
    ) -> None:
        """Open ``path``, making its tables if it is new.

        Args:
            path: The file (`RunDirectory.database`).
            detail: How much of each step to store; by default everything.
            read_only: True to look on while a run may be writing.

        Raises:
            OSError: It cannot be opened, is damaged, or a newer gruppo made it.
        """
        self.path = path
        self._detail = detail or Detail()
        with self._errors():
            mode = "ro" if read_only else "rwc"
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            self._link = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                self._prepare(read_only)
            except BaseException:
                self._link.close()
                raise

    # Writing --------------------------------------------------------------------------------

    def write_step(
        self,
        step: int,
        groups: Sequence[Group],
        *,
        advantages: Float[Tensor, "B"] | Float[Tensor, "B T"] | None,
        metrics: Mapping[str, float],
        findings: Sequence[Finding] = (),
    ) -> None:
        """Record a finished step in one transaction, durably.

        Args:
            step: From 1, one above the last (a step that is there already is an error of ours).
            groups: All groups of the step.
            advantages: One per completion, or one per token, rows in group order; None if the
                step had none.
            metrics: Name to value.
            findings: What the health rules had to say about this step.
        """
        rows = sum(len(group.completions) for group in groups)
        assert advantages is None or len(advantages) == rows, "one advantage row per completion"
        stored = groups[: self._detail.groups] if (step - 1) % self._detail.every == 0 else ()
        with self._transaction() as link:
            link.execute("INSERT INTO steps VALUES (?, ?)", (step, time.time()))
            insert_metrics(link, "metrics", step, metrics)
            insert_findings(link, findings)
            insert_groups(link, step, stored, advantages, tokens=self._detail.tokens)

    def write_evaluation(
        self, step: int, metrics: Mapping[str, float], groups: Sequence[Group] = ()
    ) -> None:
        """Record an evaluation after ``step`` (0: before training); replaces an earlier one.

        Args:
            step: Number of the last finished step.
            metrics: Name to value.
            groups: Samples to keep for showing before and after; texts and scores are stored.
        """
        with self._transaction() as link:
            link.execute("DELETE FROM evaluations WHERE step = ?", (step,))
            link.execute("DELETE FROM samples WHERE step = ?", (step,))
            insert_metrics(link, "evaluations", step, metrics)
            insert_samples(link, step, groups)

    def write_event(self, step: int, kind: str, detail: Mapping[str, object]) -> None:
        """Record that something happened after ``step`` (resumed, checkpoint saved, ...).

        Args:
            step: Number of the last finished step.
            kind: A short fixed word.
            detail: Plain JSON values; secrets and the home folder are replaced.
        """
        with self._transaction() as link:
            values = (time.time(), step, kind, detail_text(detail))
            link.execute("INSERT INTO events VALUES (?, ?, ?, ?)", values)

    def truncate_after(self, step: int) -> int:
        """Drop everything newer than ``step``; returns how many steps that were."""
        with self._transaction() as link:
            query = "SELECT COUNT(*) FROM steps WHERE step > ?"
            (dropped,) = link.execute(query, (step,)).fetchone()
            for table in STEP_TABLES:
                link.execute(f"DELETE FROM {table} WHERE step > ?", (step,))
        return dropped

    # Reading --------------------------------------------------------------------------------

    def last_step(self) -> int:
        """Number of the newest recorded step, 0 if there is none."""
        ((step,),) = self._read("SELECT COALESCE(MAX(step), 0) FROM steps")
        return step

    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """Series of every metric: name to (step, value) by step. What was NaN comes back so."""
        return _series(self._read("SELECT step, name, value FROM metrics ORDER BY step, name"))

    def evaluations(self) -> dict[str, list[tuple[int, float]]]:
        """Series of every evaluation metric, as in `metrics`; step 0 is before training."""
        return _series(self._read("SELECT step, name, value FROM evaluations ORDER BY step, name"))

    def completions(self, step: int) -> list[StoredCompletion]:
        """Completions stored for ``step``, in group and row order."""
        query = f"{COMPLETIONS} WHERE c.step = ? {IN_ORDER}"
        return [completion_from(row) for row in self._read(query, (step,))]

    def iterate(self, first: int = 1, last: int | None = None) -> Iterator[StoredCompletion]:
        """Every stored completion of steps ``first`` to ``last`` (both included; None: the end).

        They are read as they are asked for, so any size of run fits into memory.
        """
        query = f"{COMPLETIONS} WHERE c.step >= ? AND (? IS NULL OR c.step <= ?) {IN_ORDER}"
        return (completion_from(row) for row in self._read(query, (first, last, last)))

    def samples(self, step: int) -> list[StoredSample]:
        """Samples of the evaluation after ``step``."""
        query = "SELECT * FROM samples WHERE step = ? ORDER BY sample"
        return [sample_from(row) for row in self._read(query, (step,))]

    def findings(self) -> list[Finding]:
        """All findings by step."""
        return [
            Finding(
                id=row["id"],
                severity=row["severity"],
                step=row["step"],
                detail=json.loads(row["detail"]),
            )
            for row in self._read("SELECT * FROM findings ORDER BY step, rowid")
        ]

    def events(self) -> list[Event]:
        """All events in the order in which they were written."""
        return [
            Event(
                time=row["time"],
                step=row["step"],
                kind=row["kind"],
                detail=json.loads(row["detail"]),
            )
            for row in self._read("SELECT * FROM events ORDER BY rowid")
        ]

    def close(self) -> None:
        """Close it; the write-ahead log is folded in. Calling it twice is fine."""
        with self._errors():
            self._link.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Inside ---------------------------------------------------------------------------------

    def _prepare(self, read_only: bool) -> None:
        link = self._link
        link.row_factory = sqlite3.Row
        (version,) = link.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise OSError(
                f"{self.path}: made by a newer gruppo (format {version}, this one reads {VERSION})"
                "; upgrade gruppo"
            )
        if read_only:
            return
        link.execute("PRAGMA journal_mode = WAL")
        link.execute("PRAGMA synchronous = FULL")  # a step that is written survives a power cut
        if version == 0:
            with self._transaction():
                for statement in TABLES.split(";\n"):
                    link.execute(statement)
                link.execute(f"PRAGMA application_id = {_APPLICATION}")
                link.execute(f"PRAGMA user_version = {VERSION}")
        elif version < VERSION:
            with self._transaction():
                for older in range(version, VERSION):
                    link.execute(UPGRADES[older])
                link.execute(f"PRAGMA user_version = {VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._errors():
            self._link.execute("BEGIN IMMEDIATE")
            try:
                yield self._link
                self._link.execute("COMMIT")
            except BaseException:
                if self._link.in_transaction:  # a full disk has ended it already
                    self._link.execute("ROLLBACK")
                raise

    def _read(self, query: str, values: Sequence[object] = ()) -> Iterator[sqlite3.Row]:
        with self._errors():
            yield from self._link.execute(query, values)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """A disk or file that fails is an OSError; a wrong statement stays an error of ours."""
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise
        except sqlite3.DatabaseError as error:
            raise OSError(f"{self.path}: database failed ({error})") from error


def _series(rows: Iterable[sqlite3.Row]) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for step, name, value in rows:
        point = (step, math.nan if value is None else value)
        series.setdefault(unpack_text(name), []).append(point)
    return series
