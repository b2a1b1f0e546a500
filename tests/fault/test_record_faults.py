"""The run directory and its database under kill -9, full disks, second runs and planted secrets."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from gruppo.policy import checkpoint
from gruppo.record import Database, RunDirectory, dump_step, export_samples
from gruppo.types import Completion, Failure, Group, Message, Problem, Score

PRELUDE = """
import os, sys, time, types
from pathlib import Path
import gruppo
# A bare package in place of gruppo.policy, whose own imports (transformers) take seconds.
bare = types.ModuleType("gruppo.policy")
bare.__path__ = [str(Path(gruppo.__file__).parent / "policy")]
sys.modules["gruppo.policy"] = bare
from gruppo.record import Database, RunDirectory
"""


def child(code: str, *arguments: object) -> subprocess.Popen:
    program = PRELUDE + textwrap.dedent(code)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def line(process: subprocess.Popen) -> str:
    text = process.stdout.readline()
    assert text, process.stderr.read()
    return text.strip()


def end(process: subprocess.Popen, signum: int = signal.SIGKILL) -> None:
    process.send_signal(signum)
    process.communicate()


def group(text: str) -> Group:
    completion = Completion(
        tokens=(1, 2),
        logp=(-1.0, -2.0),
        mask=(True, True),
        version=(0, 0),
        text=text,
        finish="stop",
    )
    failure = Failure(kind="crash", fault="grader", text=text)
    problem = Problem(id="p", prompt=(Message("user", "q"),))
    score = Score(total=None, task=None, error=failure)
    return Group(problem=problem, prompt_tokens=(1,), completions=(completion,), scores=(score,))


HOLD = """
run = RunDirectory.open(Path(sys.argv[1]))
if os.fork() == 0:  # a reward worker that outlives its parent; it tells when it has come to life
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_lock_of_a_killed_run_is_free_at_once_even_if_its_worker_lives(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "a", "").close()
    holder = child(HOLD, tmp_path / "a")
    worker = int(line(holder))
    try:
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} on "):
            RunDirectory.open(tmp_path / "a")
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives
        RunDirectory.open(tmp_path / "a").close()
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.communicate()


def test_stale_lock_file_clock_and_time_zone_have_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunDirectory.create(tmp_path / "a", "").close()
    (tmp_path / "a" / ".lock").write_text(f"process {os.getppid()} on elsewhere\n")
    os.utime(tmp_path / "a" / ".lock", (4e9, 4e9))
    monkeypatch.setattr(time, "time", lambda: -1e9)
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    with RunDirectory.open(tmp_path / "a") as run, Database(run.database) as database:
        for step in (1, 2):
            database.write_step(step, [], advantages=None, metrics={"m": step})
            database.write_event(step, "saved", {})
            monkeypatch.setattr(time, "time", lambda step=step: -2e9 * step)
            checkpoint.save(run.checkpoints, lambda f: (f / "x").touch(), step=step)
        assert database.metrics() == {"m": [(1, 1.0), (2, 2.0)]}
        assert [event.step for event in database.events()] == [1, 2]
        assert checkpoint.latest(run.checkpoints)[0].name == "00000002"
    monkeypatch.undo()
    time.tzset()


WRITE = """
database = Database(Path(sys.argv[1]))
database.write_step(1, [], advantages=None, metrics={"m": 1.0})
link = database._link
link.execute("PRAGMA cache_size = 1")  # so that the open transaction reaches the log on the disk
link.execute("BEGIN IMMEDIATE")
link.execute("INSERT INTO steps VALUES (2, 0)")
for n in range(2000):
    link.execute("INSERT INTO metrics VALUES (2, ?, 2.0)", (f"m{n}" * 20,))
print("in the middle", flush=True)
time.sleep(60)
"""


def test_kill_in_the_middle_of_a_transaction_leaves_the_steps_before(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    writer = child(WRITE, path)
    assert line(writer) == "in the middle"
    end(writer)
    log = path.with_name("run.sqlite-wal")
    assert log.stat().st_size > 100_000  # a part of step 2 is on the disk
    with Database(path) as database:
        assert database.last_step() == 1
        assert database.metrics() == {"m": [(1, 1.0)]}
        database.write_step(2, [], advantages=None, metrics={"m": 2.0})
        assert database.metrics() == {"m": [(1, 1.0), (2, 2.0)]}
    assert not log.exists()


STEPS = """
database = Database(Path(sys.argv[1]))
for step in range(1, 100000):
    metrics = {f"m{i}": float(step) for i in range(50)}
    database.write_step(step, [], advantages=None, metrics=metrics)
    print(step, flush=True)
"""


def test_kill_at_any_moment_loses_no_finished_step(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    writer = child(STEPS, path)
    for _ in range(20):
        done = int(line(writer))
    writer.kill()
    rest = writer.communicate()[0].split("\n")
    done = max([done, *(int(text) for text in rest[:-1])])
    with Database(path) as database:
        last = database.last_step()
        assert last in (done, done + 1)  # killed after the commit, before the print
        series = database.metrics()
        assert len(series) == 50
        expected = [(step, float(step)) for step in range(1, last + 1)]
        assert all(points == expected for points in series.values())


def test_log_that_was_never_folded_in_is_recovered_by_a_copy(tmp_path: Path) -> None:
    """A copy of the files of a running database holds every committed step."""
    with Database(tmp_path / "run.sqlite") as database:
        for step in range(1, 4):
            database.write_step(step, [group("x")], advantages=torch.ones(1), metrics={"m": step})
        copy = tmp_path / "copy"
        copy.mkdir()
        for name in ("run.sqlite", "run.sqlite-wal"):
            (copy / name).write_bytes((tmp_path / name).read_bytes())
    with Database(copy / "run.sqlite") as database:
        assert database.metrics() == {"m": [(1, 1.0), (2, 2.0), (3, 3.0)]}
        assert len(database.completions(3)) == 1
    torn = copy / "run.sqlite-wal"
    torn.write_bytes(b"\0" * 4096)  # a log that is garbage is ignored by its checksums
    with Database(copy / "run.sqlite") as database:
        assert database.last_step() == 3


def test_full_disk_is_an_os_error_and_the_step_is_not_there(tmp_path: Path) -> None:
    with Database(tmp_path / "run.sqlite") as database:
        database.write_step(1, [group("x")], advantages=torch.ones(1), metrics={"m": 1.0})
        pages = database._link.execute("PRAGMA page_count").fetchone()[0]
        database._link.execute(f"PRAGMA max_page_count = {pages + 2}")  # SQLite's own ENOSPC
        with pytest.raises(OSError, match=r"run\.sqlite: database failed .*full"):
            database.write_step(
                2, [group("y" * 100_000)], advantages=torch.ones(1), metrics={"m": 2.0}
            )
        assert database.last_step() == 1
        assert [c.text for c in database.iterate()] == ["x"]
        database._link.execute("PRAGMA max_page_count = 1000000")
        database.write_step(2, [group("y" * 100_000)], advantages=torch.ones(1), metrics={})
        assert [len(c.text) for c in database.iterate()] == [1, 100_000]


def test_damaged_database_is_an_os_error_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with Database(path) as database:
        for step in range(1, 30):
            database.write_step(step, [group("x" * 500)], advantages=torch.ones(1), metrics={})
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 200] = b"\xff" * 200
    path.write_bytes(data)
    with Database(path) as database, pytest.raises(OSError, match=r"run\.sqlite: database failed"):
        list(database.iterate())


def test_interrupted_transaction_rolls_back(tmp_path: Path) -> None:
    """An exception that comes in the middle of a step (a signal's) leaves no part of it."""

    class Interrupting(dict):
        def items(self) -> object:
            yield "a", 1.0
            raise KeyboardInterrupt

    with Database(tmp_path / "run.sqlite") as database:
        with pytest.raises(KeyboardInterrupt):
            database.write_step(1, [], advantages=None, metrics=Interrupting(a=1.0))
        assert database.last_step() == 0
        database.write_step(1, [], advantages=None, metrics={"a": 1.0})
        assert database.metrics() == {"a": [(1, 1.0)]}


SECRETS = {
    "OPENAI_API_KEY": "zq7-plain-environment-secret",
    "HF_TOKEN": "hf_ZqPlantedSecretValue0123",
    "DB_PASSWORD": "zq-database-pässword",
}


def test_planted_secrets_are_in_no_recorded_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home-of-zq"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    planted = [*SECRETS.values(), "sk-zqZQzqZQzqZQzqZQzqZQ", str(home)]
    text = " | ".join([*planted, f"{home}/data.jsonl"])
    with RunDirectory.create(
        home / "runs" / "a", f'note = "{text}"\n', meta={"command": [text], text: text}
    ) as run:
        with Database(run.database) as database:
            database.write_step(1, [group("safe")], advantages=None, metrics={})
            failing = Failure(kind="exception", fault="grader", text=text)
            scored = Score(total=None, task=None, error=failing)
            leak = Group(
                problem=Problem(id="p", prompt=()),
                prompt_tokens=(),
                completions=group("safe").completions,
                scores=(scored,),
            )
            database.write_step(2, [leak], advantages=None, metrics={})
            database.write_event(2, "failed", {"trace": text, text: [text]})
            assert "[redacted]" in database.completions(2)[0].failure.text
            export_samples(database, run.path / "samples.jsonl")
        dump_step(run, 2, {"x": torch.zeros(1)}, {"error": text})
        run.tracker_id("wandb")
    files = [file for file in run.path.rglob("*") if file.is_file()]
    assert {f.name for f in files} >= {
        "recipe.toml",
        "run.json",
        "run.sqlite",
        "samples.jsonl",
        "info.json",
        "replay.txt",
    }
    for file in files:
        data = file.read_bytes()
        for secret in planted:
            assert secret.encode() not in data, (file.name, secret)
    assert 'data.jsonl"' in (run.path / "recipe.toml").read_text()


def test_old_tables_are_not_touched_by_a_failed_open(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with Database(path) as database:
        database.write_step(1, [], advantages=None, metrics={"m": 1.0})
    link = sqlite3.connect(path)
    link.execute("PRAGMA user_version = 99")
    link.close()
    before = path.read_bytes()
    with pytest.raises(OSError, match="newer gruppo"):
        Database(path)
    assert path.read_bytes() == before
