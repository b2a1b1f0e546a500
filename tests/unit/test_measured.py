"""Timed choices: the fastest call counts, and a machine keeps its first answer."""

import os
import subprocess
import sys

import pytest

from gruppo import measured
from gruppo.cache import cache_folder
from gruppo.measured import fastest, remembered


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path))


def test_works_take_turns_and_the_fastest_call_of_each_counts(monkeypatch):
    clock, calls = [0.0], []
    seconds = {"a": iter([100.0, 3.0, 2.0, 5.0]), "b": iter([100.0, 4.0, 9.0, 1.0])}
    monkeypatch.setattr(measured.time, "perf_counter", lambda: clock[0])

    def work(name):
        def once():
            calls.append(name)
            clock[0] += next(seconds[name])

        return once

    assert fastest([work("a"), work("b")], repeats=3) == [2.0, 1.0]
    assert "".join(calls) == "abababab"


def ask(answer, *depends_on):
    asked = []

    def measure():
        asked.append(answer)
        return answer

    return remembered("colour", ("red", "blue"), measure, depends_on=depends_on), len(asked)


def test_the_first_answer_stays():
    assert ask("red") == ("red", 1)
    assert ask("blue") == ("red", 0)
    assert ask("blue", "torch 3") == ("blue", 1)
    assert ask("red", "torch 3") == ("blue", 0)


def test_another_processor_is_another_machine(monkeypatch):
    assert ask("red") == ("red", 1)
    monkeypatch.setattr(measured, "processor", lambda: "another")
    assert ask("blue") == ("blue", 1)


@pytest.mark.parametrize("content", [b"", b"green", b"red blue", b"\xff\xfe"])
def test_a_damaged_file_is_measured_anew_and_mended(content):
    ask("red")
    (file,) = (cache_folder() / "measured").iterdir()
    file.write_bytes(content)
    assert ask("blue") == ("blue", 1)
    assert ask("red") == ("blue", 0)


def test_who_comes_second_takes_the_first_ones_answer():
    def slow():
        ask("red")  # another process, meanwhile
        return "blue"

    assert remembered("colour", ("red", "blue"), slow, depends_on=()) == "red"
    assert [p.suffix for p in (cache_folder() / "measured").iterdir()] == [".txt"]


def test_without_a_cache_each_measures_for_itself(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path / "file" / "below"))
    assert ask("red") == ("red", 1)
    assert ask("blue") == ("blue", 1)


def test_processes_agree(tmp_path):
    code = (
        "import random; from gruppo.measured import remembered; "
        "print(remembered('x', [str(n) for n in range(99)], "
        "lambda: str(random.SystemRandom().randrange(99)), depends_on=()))"
    )
    environment = {**os.environ, "GRUPPO_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
        for _ in range(6)
    ]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert all(process.returncode == 0 for process in processes)
