"""Verdicts of grading models, remembered by what was asked: equal questions are asked once.

In memory, for the life of the process, or besides in one file of the user's cache folder. Stored
are a digest of the question and the number that came of it, neither prompts nor completions.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Literal

from gruppo.cache import cache_folder

Keep = Literal["memory", "disk", "none"]
_MOST = 1 << 17  # numbers and digests: some 20 MB


def digest(question: object) -> str:
    """A key for a question of plain data.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    return sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class Verdicts:
    """Numbers by digest; the oldest go first when there are too many. Safe in threads."""

    def __init__(self, file: Path | None) -> None:
        """In memory, and in ``file`` if one is given."""
        self._file = file
        self._known: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def open(self) -> None:
        """Make the file. Raises OSError if it cannot be used."""
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self._file)) as base, base:
                base.execute(
                    "CREATE TABLE IF NOT EXISTS verdict (key TEXT PRIMARY KEY, value REAL)"
                )
        except sqlite3.Error as error:
            raise OSError(f"cannot keep verdicts in {self._file}: {error}") from error

    def get(self, keys: Iterable[str]) -> dict[str, float]:
        """Those of ``keys`` that are known."""
        wanted = list(dict.fromkeys(keys))
        with self._lock:
            found = {key: self._known[key] for key in wanted if key in self._known}
        missing = [key for key in wanted if key not in found]
        if self._file is not None and missing:
            # a file that broke during a run costs requests, not the run
            with contextlib.suppress(sqlite3.Error), contextlib.closing(self._connect()) as base:
                for key in missing:
                    row = base.execute("SELECT value FROM verdict WHERE key = ?", (key,)).fetchone()
                    if row is not None:
                        found[key] = row[0]
        return found

    def put(self, verdicts: Mapping[str, float]) -> None:
        """Remember ``verdicts``."""
        with self._lock:
            self._known.update(verdicts)
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
        if self._file is not None and verdicts:
            with (
                contextlib.suppress(sqlite3.Error),
                contextlib.closing(self._connect()) as base,
                base,
            ):
                base.executemany(
                    "INSERT OR REPLACE INTO verdict VALUES (?, ?)", list(verdicts.items())
                )

    def _connect(self) -> sqlite3.Connection:
        assert self._file is not None, "only called with a file"
        return sqlite3.connect(self._file, timeout=5.0)


@cache
def verdicts(file: Path | None) -> Verdicts:
    """The one memory of a file; with None, that of this process."""
    return Verdicts(file)


def remembered(keep: Keep) -> Verdicts:
    """Where verdicts are kept: "none" forgets them with the call."""
    if keep == "none":
        return Verdicts(None)
    return verdicts(cache_folder() / "verdicts.sqlite" if keep == "disk" else None)
