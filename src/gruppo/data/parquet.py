"""Parquet rows through pyarrow (extra ``parquet``), with row numbers; types are the file's own."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from gruppo.data.jsonl import check_file
from gruppo.data.rows import Reader, Row

# A Parquet file of a few KiB can unpack to anything; this much is read without asking.
MAX_UNPACKED = 8 * 2**30
BATCH = 1024


def readers(path: str | Path) -> Iterator[tuple[str, Reader]]:
    """Rows of a file for `gruppo.data.rows.collect`: "row 1" and on, and the row.

    Dates become ISO text and decimals their digits, so that nothing is rounded.

    Raises:
        ValueError: if it is not a Parquet file, damaged, unpacks to more than 8 GiB, or pyarrow
            is missing.
        OSError: if it cannot be read.
    """
    check_file(path)
    number = 0
    for rows in _batches(path):
        for row in rows:
            number += 1
            plain = {name: _plain(value) for name, value in row.items()}
            yield f"row {number}", _reader(plain)


def _reader(row: Row) -> Reader:
    return lambda: (row, lambda: row)


def _batches(path: str | Path) -> Iterator[list[dict[str, object]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(
            f'{path}: reading Parquet needs pyarrow; pip install "gruppo[parquet]"'
        ) from None
    try:
        # pre_buffer only helps remote files; without it less is allocated before checks run.
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            _check_schema(path, file.schema_arrow.names, file.metadata)
            for batch in file.iter_batches(batch_size=BATCH, use_threads=False):
                yield _as_rows(path, batch)
    except (ArrowException, MemoryError, OverflowError) as error:
        raise ValueError(_damaged(path, error)) from None
    except OSError as error:
        if error.errno:  # a real one of the file system; pyarrow's own have no number
            raise
        raise ValueError(_damaged(path, error)) from None


def _as_rows(path: str | Path, batch: Any) -> list[dict[str, object]]:
    """Python values of a batch; times are cast to text first, which keeps their nanoseconds."""
    from pyarrow import string, types

    for index, column in enumerate(batch.schema):
        if types.is_temporal(column.type):
            text = batch.column(index).cast(string())
            batch = batch.set_column(index, column.name, text)
    try:
        return batch.to_pylist()
    except ValueError as error:  # nanoseconds inside lists or tables
        raise ValueError(f"{path}: has a value that Python cannot hold ({error})") from None


def _damaged(path: str | Path, error: Exception) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{path}: is not a Parquet file, or damaged ({text}); write it again"


def _check_schema(path: str | Path, names: list[str], metadata: Any) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{path}: field {min(twice)!r}: is there twice; rename one column")
    unpacked = sum(
        metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)
    )
    if unpacked > MAX_UNPACKED:
        raise ValueError(
            f"{path}: unpacks to {unpacked / 2**30:.0f} GiB, more than {MAX_UNPACKED // 2**30}; "
            "convert it to JSONL and set streaming"
        )


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal) else value
