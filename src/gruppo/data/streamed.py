"""JSONL larger than memory: an index of where each row starts, and rows read when asked for.

Opening reads the file once, checks every row, and keeps 8 bytes a row (and 32 more for a moment,
while it looks for repeated ids); a shuffled epoch takes 8 more. Shuffling, splitting and resuming
then work on row numbers. It does not cache rows and does not follow a file that grows: a file that
changed after opening is refused.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import final

import torch

from gruppo.data.jsonl import MAX_LINE, check_file, parse_exact, parse_line, read_lines
from gruppo.data.keyed import WORD, hash64
from gruppo.data.rows import Draft, Report, Shape
from gruppo.types import Problem


@final
class StreamedProblems:
    """The problems of a JSONL file, read row by row.

    Args:
        path: the file.
        shape: how a row becomes a problem.
        source: name of the data set, for metrics.

    Raises:
        ValueError: on bad rows (up to ten are told), repeated ids, or no rows.
        OSError: if the file cannot be read.
    """

    __slots__ = ("_again", "_offsets", "_path", "_shape", "_source", "_stamp")

    def __init__(self, path: str | Path, *, shape: Shape, source: str) -> None:
        self._path, self._shape, self._source = path, shape, source
        self._stamp = _stamp(check_file(path))
        self._offsets, contents = self._index()
        self._again = self._repeated(contents)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._offsets)

    def __getitem__(self, index: int) -> Problem:
        """Read the problem at ``index``.

        Raises:
            ValueError: if the file changed after it was opened.
            IndexError: if there is no such row.
        """
        draft = self._draft(index)
        return draft.problem(self._source, self._again.get(index, 1))

    def __iter__(self) -> Iterator[Problem]:
        """Read all problems in the order of the file."""
        return (self[index] for index in range(len(self)))

    def _draft(self, index: int) -> Draft:
        with open(self._path, "rb") as file:
            if _stamp(os.fstat(file.fileno())) != self._stamp:
                raise ValueError(
                    f"{self._path}: changed while it was in use; leave it alone and resume"
                )
            file.seek(self._offsets[index])
            data = file.readline(MAX_LINE + 1).strip(b"\r\n")
        return self._shape.read(parse_line(data), lambda: parse_exact(data))

    def _index(self) -> tuple[array, array]:
        """Check every row. Returns where they start, and what identifies them (hashed)."""
        offsets, contents, report = array("Q"), array("Q"), Report(str(self._path))
        for line in read_lines(self._path):
            report.rows += 1
            data = line.data
            try:
                draft = self._shape.read(parse_line(data), lambda data=data: parse_exact(data))
            except ValueError as error:
                report.add(str(line.number), error)
                continue
            offsets.append(line.offset)
            contents.append(draft.digest if draft.id is None else hash64("id", draft.id))
        report.close()
        return offsets, contents

    def _repeated(self, contents: array) -> dict[int, int]:
        """Occurrence number of each row that is not the first with its content.

        Raises:
            ValueError: if ids of the id column repeat.
        """
        signed = array("q", (value - WORD // 2 for value in contents))
        values, order = torch.sort(torch.frombuffer(signed, dtype=torch.int64), stable=True)
        again: dict[int, int] = {}
        same = (values[1:] == values[:-1]).nonzero().flatten().tolist()
        for place in same:
            first, row = int(order[place]), int(order[place + 1])
            again[row] = again.get(first, 1) + 1
        if again and self._shape.columns.id is not None:
            told = [self._draft(row).id for row in sorted(again)[:10]]
            raise ValueError(
                f"{self._path}: field {self._shape.columns.id!r}: {len(again)} ids were used "
                f"before, the first are {', '.join(map(repr, told))}; ids must be unique"
            )
        return again


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
