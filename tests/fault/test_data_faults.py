"""Malformed data sets: refused with file, line and field, nothing written; odd legal ones load."""

import json
import os
import re
import socket
import zipfile
from gzip import compress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gruppo.data import Columns, Jsonl, Parquet, Prompting, Verl
from gruppo.data import parquet as parquet_module
from gruppo.data.jsonl import MAX_LINE

GOOD = b'{"question": "q", "answer": "a"}\n'
DEEP = b'{"question": "q", "answer": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"

# name: (bytes, what the error must say after the file's name)
BAD = {
    "truncated row": (GOOD + b'{"question": "q", "answ', ":2: is cut off at column 23"),
    "truncated after comma": (GOOD + b'{"question": "q",', ":2: is cut off"),
    "truncated in the middle": (b'{"question": "q"\n' + GOOD, ":1: is cut off"),
    "two rows on a line": (GOOD.strip() * 2, ":1: is not JSON at column 33 (extra data)"),
    "pretty-printed": (b'{\n"question": "q"\n}\n', ":1: is cut off"),
    "array of rows": (b'[{"question": "q"}]\n', ":1: is a list, not an object"),
    "a string": (b'"question"\n', ":1: is a str, not an object"),
    "a number": (b"12\n", ":1: is a int, not an object"),
    "null row": (b"null\n", ":1: is a NoneType, not an object"),
    "CSV": (b"question,answer\n1,2\n", ":1: is not JSON at column 1"),
    "single quotes": (b"{'question': 'q'}\n", ":1: is not JSON at column 2"),
    "trailing comma": (b'{"question": "q", "answer": "a",}\n', ":1: is not JSON at column"),
    "comment": (b"// rows\n" + GOOD, ":1: is not JSON at column 1"),
    "raw newline in text": (b'{"question": "a\nb"}\n', ":1: is cut off"),
    "raw tab in text": (b'{"question": "a\tb", "answer": "a"}\n', ":1: is not JSON at column 16"),
    "bad escape": (b'{"question": "\\boxed", "answer": "\\q"}\n', ":1: is not JSON at column"),
    "old Mac line ends": (GOOD.strip() + b"\r" + GOOD.strip(), ":1: is not JSON at column"),
    "latin-1": (GOOD + b'{"question": "caf\xe9", "answer": "a"}\n', ":2: is not UTF-8 (byte 0xe9"),
    "windows-1252 quotes": (b'{"question": "\x93q\x94"}\n', ":1: is not UTF-8 (byte 0x93"),
    "overlong UTF-8": (b'{"question": "\xc0\xaf"}\n', ":1: is not UTF-8 (byte 0xc0"),
    "raw surrogate": (b'{"question": "\xed\xa0\x80"}\n', ":1: is not UTF-8 (byte 0xed"),
    "UTF-16 with mark": (GOOD.decode().encode("utf-16"), ": is UTF-16 text"),
    "UTF-16 big-endian": (b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), ": is UTF-16 text"),
    "UTF-16 without mark": (GOOD.decode().encode("utf-16-le"), ":1: is not JSON at column 2"),
    "mark on line 2": (GOOD + b"\xef\xbb\xbf" + GOOD, ":2: is not JSON at column 1"),
    "NUL bytes": (GOOD + b"\0" * 40, ":2: is not JSON at column 1"),
    "half a surrogate pair": (
        b'{"question": "\\ud83d", "answer": "a"}\n',
        ":1: field 'question': has half of a surrogate pair",
    ),
    "surrogate in a key": (
        b'{"question": "q", "answer": "a", "\\udc00": {"x": 1}}\n',
        ":1: field '\\udc00': has half of a surrogate pair",
    ),
    "NaN": (b'{"question": "q", "answer": NaN}\n', ":1: has NaN, which JSON does not know"),
    "Infinity": (b'{"question": "q", "x": [-Infinity]}\n', ":1: has -Infinity"),
    "overflowing number": (b'{"question": "q", "x": 1e999}\n', ":1: has the number 1e999"),
    "5000 digits": (
        b'{"question": "q", "answer": ' + b"1" * 5000 + b"}\n",
        ":1: has a number of 5000 digits; write it in quotes",
    ),
    "duplicate key": (
        b'{"question": "q", "answer": "a", "answer": "b"}\n',
        ":1: field 'answer': is there twice",
    ),
    "duplicate nested key": (
        b'{"question": "q", "answer": "a", "x": {"y": 1, "y": 1}}\n',
        ":1: field 'y': is there twice",
    ),
    "nested too deeply": (DEEP, ":1: is nested too deeply"),
    "missing question": (
        GOOD + b'{"prompt": "q", "answer": "a"}\n',
        ":2: field 'question': missing; this row has 'prompt', 'answer'",
    ),
    "missing answer": (b'{"question": "q"}\n', ":1: field 'answer': missing"),
    "case of the column": (b'{"Question": "q", "answer": 1}\n', ":1: field 'question': missing"),
    "space in the column": (b'{"question ": "q", "answer": 1}\n', ":1: field 'question': missing"),
    "empty object": (b"{}\n", ":1: field 'question': missing; this row has none"),
    "null answer": (b'{"question": "q", "answer": null}\n', ":1: field 'answer': is null"),
    "null question": (b'{"question": null, "answer": "a"}\n', ":1: field 'question': is null"),
    "boolean answer": (b'{"question": "q", "answer": true}\n', ":1: field 'answer': is true"),
    "list answer": (b'{"question": "q", "answer": ["a"]}\n', ":1: field 'answer': is a list"),
    "table answer": (b'{"question": "q", "answer": {}}\n', ":1: field 'answer': is a dict"),
    "table question": (b'{"question": {"a": 1}, "answer": 1}\n', ":1: field 'question': is a dict"),
    "empty question": (b'{"question": "", "answer": "a"}\n', ":1: field 'question': is empty"),
    "blank answer": (b'{"question": "q", "answer": " \\n"}\n', ":1: field 'answer': is empty"),
    "chat of texts": (
        b'{"question": ["hi"], "answer": "a"}\n',
        ":1: field 'question': message 1 is not a table",
    ),
    "chat without content": (
        b'{"question": [{"role": "user", "content": null}], "answer": "a"}\n',
        ':1: field \'question\': message 1 needs "role" and "content"',
    ),
    "empty chat": (b'{"question": [], "answer": "a"}\n', ":1: field 'question': is an empty list"),
    "chat that ends in an answer": (
        b'{"question": [{"role": "assistant", "content": "x"}], "answer": "a"}\n',
        ":1: field 'question': ends with the assistant's turn",
    ),
    "empty file": (b"", ": is empty"),
    "only a mark": (b"\xef\xbb\xbf", ": holds no rows"),
    "blank lines only": (b"\n \r\n\t\n", ": holds no rows"),
    "gzip": (compress(GOOD, mtime=0), ": is gzip-compressed; unpack it first"),
    "gzip bomb": (compress(b"\n" * 10_000_000, mtime=0), ": is gzip-compressed; unpack it first"),
    "bzip2": (b"BZh91AY&SY", ": is bzip2-compressed"),
    "xz": (b"\xfd7zXZ\x00\x00", ": is xz-compressed"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00", ": is zstd-compressed"),
    "Parquet": (b"PAR1" + b"\0" * 20 + b"PAR1", ": is a Parquet file"),
    "16 MiB line": (
        GOOD + b'{"question": "' + b"x" * MAX_LINE + b'"}\n',
        ":2: the line is longer than 16 MiB",
    ),
}

# name: (bytes, expected (question, answer) pairs)
LEGAL = {
    "BOM": (b"\xef\xbb\xbf" + GOOD, [("q", "a")]),
    "CRLF": (GOOD.replace(b"\n", b"\r\n") * 2, [("q", "a")] * 2),
    "no newline at the end": (GOOD + GOOD.strip(), [("q", "a")] * 2),
    "blank lines between": (b"\n" + GOOD + b"\n\n  \n" + GOOD, [("q", "a")] * 2),
    "date-like": (b'{"question": "2024-01-02", "answer": "1/2"}\n', [("2024-01-02", "1/2")]),
    "time-like": (b'{"question": "12:30", "answer": "1e6"}\n', [("12:30", "1e6")]),
    "30-digit integer": (
        b'{"question": "q", "answer": 123456789012345678901234567890}\n',
        [("q", "123456789012345678901234567890")],
    ),
    "30 decimals": (
        b'{"question": 1.50, "answer": 0.100000000000000000000000000001}\n',
        [("1.50", "0.100000000000000000000000000001")],
    ),
    "exponents and minus zero": (b'{"question": -0, "answer": 1E+05}\n', [("-0", "1E+05")]),
    "text that looks like other types": (
        b'{"question": "NaN", "answer": "null"}\n{"question": "True", "answer": "007"}\n',
        [("NaN", "null"), ("True", "007")],
    ),
    "escapes": (b'{"question": "\\u00e9\\ud83d\\ude00", "answer": "\\"\\n"}\n', [("é😀", '"\n')]),
    "line separators in text": (
        '{"question": "a\u2028b\x85c", "answer": "a"}\n'.encode(),
        [("a\u2028b\x85c", "a")],
    ),
    "NUL escape": (b'{"question": "a\\u0000b", "answer": "a"}\n', [("a\0b", "a")]),
}


@pytest.fixture
def folder(tmp_path):
    """A folder that must hold the one data file afterwards, and nothing else."""
    yield tmp_path
    assert {entry.name for entry in tmp_path.iterdir()} <= {"rows.jsonl"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_malformed_jsonl(folder, name, streaming):
    data, text = BAD[name]
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"{path}{text}")):
        Jsonl(path=str(path), streaming=streaming).load()
    assert path.read_bytes() == data


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", LEGAL)
def test_legal_jsonl_loads_without_guessing(folder, name, streaming):
    data, expected = LEGAL[name]
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    problems = Jsonl(path=str(path), streaming=streaming).load()
    assert [(p.prompt[0].content, p.answer) for p in problems] == expected


def test_there_are_at_least_60_malformed_sets():
    assert len(BAD) >= 60


def test_all_bad_rows_are_told_up_to_ten(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((GOOD + b'{"question": "q"}\n') * 13)
    with pytest.raises(ValueError, match="13 of 26 rows cannot be used") as caught:
        Jsonl(path=str(path)).load()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines[1:11]] == [str(2 * i) for i in range(1, 11)]
    assert lines[11:] == ["... and 3 more"]


@pytest.mark.parametrize("streaming", [False, True])
def test_repeated_ids(tmp_path, streaming):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "q", "answer": "a", "id": name} for name in ("x", "y", "x")]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    source = Jsonl(path=str(path), columns=Columns(id="id"), streaming=streaming)
    with pytest.raises(ValueError, match=r"field 'id'.*'x'.*must be unique"):
        source.load()


def test_template_column_missing_from_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "a", "hint": "h"}\n' + GOOD)
    assert len(Jsonl(path=str(path)).load()) == 2
    asked = Jsonl(path=str(path), prompting=Prompting(template="{hint} {question}"))
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: field 'hint': the template asks")):
        asked.load()


@pytest.mark.parametrize("kind", [Jsonl, Parquet, Verl])
class TestNotAFile:
    def test_folder(self, tmp_path, kind):
        with pytest.raises(ValueError, match="is a folder; name a file in it"):
            kind(path=str(tmp_path)).load()

    def test_fifo(self, tmp_path, kind):
        path = tmp_path / "pipe"
        os.mkfifo(path)
        with pytest.raises(ValueError, match="is a pipe or device"):
            kind(path=str(path)).load()

    def test_socket(self, tmp_path, kind, monkeypatch):
        monkeypatch.chdir(tmp_path)  # a socket's address is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("s")
            with pytest.raises(ValueError, match="is a pipe or device"):
                kind(path="s").load()

    def test_device(self, kind):
        with pytest.raises(ValueError, match="/dev/zero: is a pipe or device"):
            kind(path="/dev/zero").load()

    def test_nothing_there(self, tmp_path, kind):
        with pytest.raises(FileNotFoundError, match=r"none\.x: no such file; check the path"):
            kind(path=str(tmp_path / "none.x")).load()

    def test_link_to_nothing(self, tmp_path, kind):
        (tmp_path / "link").symlink_to(tmp_path / "gone")
        with pytest.raises(FileNotFoundError, match="no such file"):
            kind(path=str(tmp_path / "link")).load()

    def test_empty(self, tmp_path, kind):
        (tmp_path / "e").touch()
        with pytest.raises(ValueError, match="is empty"):
            kind(path=str(tmp_path / "e")).load()


def test_a_gigabyte_on_one_line_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:  # sparse: a gigabyte of NUL takes no disk
        file.write(b'{"question": "')
        file.truncate(2**30)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the line is longer than 16 MiB"):
        Jsonl(path=str(path)).load()


def test_zip_archive(tmp_path):
    path = tmp_path / "rows.jsonl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", b"\n" * 1_000_000)
    with pytest.raises(ValueError, match="is a zip archive; unpack it first"):
        Jsonl(path=str(path)).load()


def test_a_file_that_changes_while_it_is_streamed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD * 3)
    problems = Jsonl(path=str(path), streaming=True).load()
    path.write_bytes(GOOD * 3 + b"\n")
    with pytest.raises(ValueError, match="changed while it was in use"):
        problems[1]


def parquet_file(tmp_path, **columns):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"PAR1",
        b"garbage" * 100,
        b"PAR1" + b"\xff" * 200 + b"\x40\0\0\0PAR1",
        GOOD,
        compress(GOOD, mtime=0),
    ],
)
def test_parquet_garbage(tmp_path, data):
    path = tmp_path / "rows.parquet"
    path.write_bytes(data)
    for kind in (Parquet, Verl):
        with pytest.raises(ValueError, match=re.escape(f"{path}: is not a Parquet file, or dam")):
            kind(path=str(path)).load()


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.99])
def test_truncated_parquet(tmp_path, keep):
    path = parquet_file(tmp_path, question=["q"] * 500, answer=["a"] * 500)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match="is not a Parquet file, or damaged"):
        Parquet(path=str(path)).load()


def test_parquet_with_a_damaged_page(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = {"question": [f"question {i * 7919}" for i in range(3000)], "answer": ["a"] * 3000}
    pq.write_table(pa.table(rows), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[200:2000] = bytes(1800)
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="is not a Parquet file, or damaged"):
        Parquet(path=str(path)).load()


def test_parquet_that_unpacks_to_too_much(tmp_path, monkeypatch):
    path = parquet_file(tmp_path, question=["q" * 1000] * 5000, answer=["a"] * 5000)
    monkeypatch.setattr(parquet_module, "MAX_UNPACKED", 3000)
    with pytest.raises(ValueError, match="unpacks to"):
        Parquet(path=str(path)).load()


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"question": ["q", None], "answer": ["a", "b"]}, "row 2: field 'question': is null"),
        ({"question": ["q"], "answer": [True]}, "row 1: field 'answer': is true"),
        ({"question": ["q"], "answer": [float("nan")]}, "row 1: field 'answer': is nan"),
        ({"question": ["q"], "answer": [b"\xff"]}, "row 1: field 'answer': is a bytes"),
        ({"q": ["q"], "answer": ["a"]}, "row 1: field 'question': missing; this row has 'q'"),
        (
            {"question": ["q", "r"], "answer": ["a", "b"], "image": [None, b"\x89PNG"]},
            "rows.parquet:row 2: field 'image': holds a bytes, which JSON cannot; remove the "
            "column, or write it as text",
        ),
        (
            {"question": ["q"], "answer": ["a"], "range": [[1.0, float("inf")]]},
            "row 1: field 'range': holds inf",
        ),
        ({"question": pa.array([], pa.string())}, ": holds no rows"),
    ],
)
def test_bad_parquet_rows(tmp_path, columns, text):
    path = parquet_file(tmp_path, **columns)
    with pytest.raises(ValueError, match=re.escape(text)):
        Parquet(path=str(path)).load()


def test_parquet_with_a_column_twice(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_arrays([pa.array(["q"])] * 2, names=["question", "question"])
    pq.write_table(table, path)
    with pytest.raises(ValueError, match="field 'question': is there twice"):
        Parquet(path=str(path)).load()


def test_parquet_times_keep_their_nanoseconds(tmp_path):
    stamps = pa.array([1_700_000_000_000_000_001], pa.timestamp("ns"))
    path = parquet_file(tmp_path, question=["q"], answer=["a"], when=stamps)
    (problem,) = Parquet(path=str(path)).load()
    assert problem.info == {"when": "2023-11-14 22:13:20.000000001"}


def test_parquet_times_that_python_cannot_hold(tmp_path):
    inner = pa.array([[1]], pa.list_(pa.timestamp("ns")))
    path = parquet_file(tmp_path, question=["q"], answer=["a"], when=inner)
    with pytest.raises(ValueError, match=re.escape(f"{path}: has a value that Python cannot hold")):
        Parquet(path=str(path)).load()
