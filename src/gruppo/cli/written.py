"""Lists and tables for people: plain lines where output is no terminal, and JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.table import Table
from rich.text import Text


@runtime_checkable
class Advised(Protocol):
    """A finding of the lab or of a preflight."""

    @property
    def severity(self) -> str:
        """error, warning or note."""
        ...

    @property
    def rule(self) -> str:
        """Its name."""
        ...

    @property
    def text(self) -> str:
        """What is wrong."""
        ...

    @property
    def fix(self) -> str:
        """What to change."""
        ...


_COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}


def say(console: Console, text: str = "") -> None:
    """A line as it is, never wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; else lines with columns of equal width."""
    if console.is_terminal:
        table = Table(*head, box=None)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    widths = [max(len(row[n]) for row in [head, *rows]) for n in range(len(head))]
    for row in [head, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        say(console, "  ".join(cells).rstrip())


def show_findings(console: Console, findings: Sequence[Advised]) -> None:
    """Each finding in two lines: what, and what to change."""
    for finding in findings:
        line = f"{finding.severity} {finding.rule}: {printable(finding.text)}"
        if console.is_terminal:
            console.print(Text(line, style=_COLOURS[finding.severity]), soft_wrap=True)
        else:
            say(console, line)
        say(console, f"  fix: {finding.fix}")


def printable(text: str, *, keep: str = "") -> str:
    r"""Text of unknown origin: control and direction marks are spelled out, but those in ``keep``.

    A model can write escape sequences too, which would move a terminal's cursor or set its title.

    >>> printable("a\u202eb\tc")
    'a\\u202eb\\tc'
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def write_json(path: Path, found: Any) -> None:
    """Write ``found``; numbers that JSON lacks become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(found), indent=1, allow_nan=False)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
