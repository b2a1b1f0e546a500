"""JSON Lines, read strictly: bytes to lines to rows, with line numbers, without guessing types.

Strict means: one JSON object a line, UTF-8 (a byte-order mark and CRLF are fine), no NaN or
Infinity, no key twice, no unpaired surrogate. Strings stay strings, whatever they look like.
Compressed files are not opened: what they unpack to has no bound.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from gruppo.data.rows import Reader, Row

MAX_LINE = 16 * 1024 * 1024
# Python refuses to make text of longer integers (its guard against quadratic conversion).
MAX_DIGITS = 4300
_BOM = b"\xef\xbb\xbf"
_FOREIGN = (
    (b"\x1f\x8b", "is gzip-compressed; unpack it first"),
    (b"PK\x03\x04", "is a zip archive; unpack it first"),
    (b"BZh", "is bzip2-compressed; unpack it first"),
    (b"\xfd7zXZ", "is xz-compressed; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed; unpack it first"),
    (b"PAR1", 'is a Parquet file; use kind = "parquet"'),
    (b"\xff\xfe", "is UTF-16 text; convert it to UTF-8"),
    (b"\xfe\xff", "is UTF-16 text; convert it to UTF-8"),
)


class Line(NamedTuple):
    """A line that is not blank: its number (from 1), where it starts, its bytes."""

    number: int
    offset: int
    data: bytes


def check_file(path: str | Path) -> os.stat_result:
    """Make sure that ``path`` is a regular file that is not empty.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is a folder, a pipe, a device or empty.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; check the path of the data") from None
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{path}: is a folder; name a file in it")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: is a pipe or device, not a file; save the data to a file")
    if not found.st_size:
        raise ValueError(f"{path}: is empty; name a file with at least one row")
    return found


def read_lines(path: str | Path) -> Iterator[Line]:
    """Go through the lines of a file that are not blank, as bytes without their line ends.

    Raises:
        ValueError: if it is no JSONL file by its first bytes, or a line is longer than 16 MiB.
        OSError: if it cannot be read.
    """
    check_file(path)
    with open(path, "rb") as file:
        start = file.read(8)
        for magic, text in _FOREIGN:
            if start.startswith(magic):
                raise ValueError(f"{path}: {text}")
        offset = len(_BOM) if start.startswith(_BOM) else 0
        file.seek(offset)
        number = 0
        while data := file.readline(MAX_LINE + 1):
            number += 1
            if len(data) > MAX_LINE:
                raise ValueError(
                    f"{path}:{number}: the line is longer than {MAX_LINE // 2**20} MiB; write one "
                    "row a line"
                )
            if data.strip():
                yield Line(number, offset, data.strip(b"\r\n"))
            offset += len(data)


def parse_line(data: bytes) -> Row:
    """Parse one line to a row; integers of any size and all strings are exact.

    >>> parse_line(b'{"id": 123456789012345678901234567890, "when": "2024-01-02"}')
    {'id': 123456789012345678901234567890, 'when': '2024-01-02'}

    Raises:
        ValueError: saying what is wrong and where.
    """
    return _parse(data, _integer, _real)


def parse_exact(data: bytes) -> Row:
    """Parse one line, with every number as the text it was written in.

    >>> parse_exact(b'{"answer": 0.10}')
    {'answer': '0.10'}
    """
    return _parse(data, str, str)


def _parse(
    data: bytes, integer: Callable[[str], object], real: Callable[[str], object]
) -> dict[str, object]:
    try:
        row = json.loads(
            data.decode("utf-8"),
            parse_int=integer,
            parse_float=real,
            parse_constant=_constant,
            object_pairs_hook=_no_repetition,
        )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not UTF-8 (byte 0x{data[error.start]:02x} at column {error.start + 1}); convert "
            "the file, for instance with iconv -f latin1 -t utf-8"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(_json_fault(error)) from None
    except RecursionError:
        raise ValueError("is nested too deeply; flatten the row") from None
    if not isinstance(row, dict):
        kind = "a list" if isinstance(row, list) else f"a {type(row).__name__}"
        raise ValueError(f"is {kind}, not an object; write one {{...}} a line")
    if b"\\u" in data:
        _refuse_surrogates(row)
    return row


def _json_fault(error: json.JSONDecodeError) -> str:
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated"):
        return f"is cut off at column {len(error.doc)}; write one whole object a line"
    what = error.msg[0].lower() + error.msg[1:]
    return f"is not JSON at column {error.colno} ({what}); write one object a line"


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"has a number of {len(digits)} digits; write it in quotes")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"has the number {digits[:40]}, which is out of range; write it in quotes")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"has {name}, which JSON does not know; remove the row or write null")


def _no_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"field {key!r}: is there twice; keep one")
            seen.add(key)
    return row


def _refuse_surrogates(row: dict[str, object]) -> None:
    for key, value in row.items():
        try:
            json.dumps([key, value], ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(
                f"field {key!r}: has half of a surrogate pair, which is no text; repair the escape"
            ) from None


def readers(path: str | Path) -> Iterator[tuple[str, Reader]]:
    """Rows of a file for `gruppo.data.rows.collect`: the line number, and its parser."""
    for line in read_lines(path):
        yield str(line.number), _reader(line.data)


def _reader(data: bytes) -> Reader:
    return lambda: (parse_line(data), lambda: parse_exact(data))
