"""run.sqlite: what is written comes back equal, per step, whatever the text."""

import json
import math
import sqlite3
from pathlib import Path

import pytest
import torch

from gruppo.record import Database, Detail, Finding, Tokens, export_samples
from gruppo.reward import Gate, Part, RewardSet
from gruppo.types import Completion, Failure, Group, Message, Problem, Score

HOSTILE = [
    "",
    "\0",
    "a\0b",
    "\ud800",
    "x\udfff\ud800y",
    "'; DROP TABLE steps; --",
    "<script>alert(1)</script>",
    "\r\n\u2028\u2029\x1b[31m",
    "𝕏 é \ufeff",
    "x" * 1_000_000,
]


def completion(text: str = "4", num: int = 3, mask: tuple[bool, ...] | None = None) -> Completion:
    return Completion(
        tokens=tuple(range(100, 100 + num)),
        logp=tuple(-0.5 * (i + 1) for i in range(num)),
        mask=mask if mask is not None else (True,) * num,
        version=tuple(range(5, 5 + num)),
        text=text,
        finish="stop",
    )


def group(
    *completions: Completion, scores: tuple[Score, ...] | None = None, name: str = "p1"
) -> Group:
    return Group(
        problem=Problem(
            id=name,
            prompt=(Message("system", "s"), Message("user", "2+2?")),
            answer="4",
            source="a",
        ),
        prompt_tokens=(1, 2, 3),
        completions=completions,
        scores=scores or (Score(total=1.0, task=1.0),) * len(completions),
    )


@pytest.fixture
def database(tmp_path: Path):
    with Database(tmp_path / "run.sqlite") as opened:
        yield opened


def test_completion_comes_back_equal(database: Database) -> None:
    failure = Failure(kind="timeout", fault="completion", text="took 5 s")
    scores = (
        Score(total=0.1, task=1.0, parts={"exact": 1.0, "format": None, "bad": math.nan}),
        Score(total=None, task=None, error=failure),
    )
    mask = (True, False, True)
    database.write_step(
        1,
        [group(completion(mask=mask), completion("", 0), scores=scores)],
        advantages=torch.tensor([0.25, -1 / 3], dtype=torch.float64),
        metrics={},
    )
    first, second = database.completions(1)
    assert (first.step, first.group, first.row) == (1, 0, 0)
    assert (first.problem, first.source, first.answer) == ("p1", "a", "4")
    assert first.prompt == (Message("system", "s"), Message("user", "2+2?"))
    assert first.tokens == Tokens(
        ids=(100, 101, 102), logp=(-0.5, -1.0, -1.5), mask=mask, advantage=None
    )
    assert (first.text, first.num_tokens, first.version, first.finish) == ("4", 3, 5, "stop")
    assert (first.advantage, first.total, first.task) == (0.25, 0.1, 1.0)
    assert first.parts == {"exact": 1.0, "format": None, "bad": None}
    assert first.failure is None
    assert second.row == 1
    assert second.advantage == -1 / 3
    assert (second.total, second.task, second.version) == (None, None, None)
    assert second.tokens == Tokens(ids=(), logp=(), mask=(), advantage=None)
    assert second.failure == failure


def test_token_advantages_and_their_mean_over_trained_tokens(database: Database) -> None:
    advantages = torch.tensor([[1.0, 5.0, 3.0, 9.0], [2.0, 9.0, 9.0, 9.0]], dtype=torch.float64)
    rows = [completion(mask=(True, False, True)), completion(num=1, mask=(False,))]
    database.write_step(1, [group(*rows)], advantages=advantages, metrics={})
    first, second = database.completions(1)
    assert first.advantage == 2.0
    assert first.tokens.advantage == (1.0, 5.0, 3.0)
    assert second.advantage == 0.0
    assert second.tokens.advantage == (2.0,)


def test_log_probabilities_keep_float32_and_nan(database: Database) -> None:
    third = float(torch.tensor(-1 / 3, dtype=torch.float32))
    odd = Completion(
        tokens=(2**31 - 1, 0),
        logp=(third, math.nan),
        mask=(True, True),
        version=(0, 0),
        text="",
        finish="length",
    )
    database.write_step(1, [group(odd)], advantages=None, metrics={})
    (row,) = database.completions(1)
    assert row.tokens.ids == (2**31 - 1, 0)
    assert row.tokens.logp[0] == third
    assert math.isnan(row.tokens.logp[1])
    assert row.advantage is None


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_survives_database_and_export(
    database: Database, text: str, tmp_path: Path
) -> None:
    problem = Problem(id=text, prompt=(Message(text, text),), answer=text, source=text)
    score = Score(total=0.0, task=0.0, parts={text: 1.0})
    hostile = Group(
        problem=problem, prompt_tokens=(), completions=(completion(text),), scores=(score,)
    )
    database.write_step(1, [hostile], advantages=torch.zeros(1), metrics={text: 1.5})
    database.write_evaluation(1, {text: 2.5}, [hostile])
    (row,) = database.completions(1)
    assert (row.text, row.problem, row.source, row.answer) == (text,) * 4
    assert row.prompt == (Message(text, text),)
    assert row.parts == {text: 1.0}
    assert database.metrics() == {text: [(1, 1.5)]}
    assert database.evaluations() == {text: [(1, 2.5)]}
    assert database.samples(1)[0].text == text
    assert export_samples(database, tmp_path / "out.jsonl") == 1
    line = (tmp_path / "out.jsonl").read_bytes()
    assert line.count(b"\n") == 1
    value = json.loads(line)
    assert value["completion"] == text
    assert value["prompt"] == [{"role": text, "content": text}]


def test_metric_series_with_nan_as_null(database: Database, tmp_path: Path) -> None:
    values = [0.1, math.nan, math.inf, 1e308]
    for step, value in enumerate(values, start=1):
        database.write_step(step, [], advantages=None, metrics={"loss": value, "b": step})
    series = database.metrics()
    assert list(series) == ["b", "loss"]
    assert series["b"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert [step for step, _ in series["loss"]] == [1, 2, 3, 4]
    assert series["loss"][0][1] == 0.1
    assert math.isnan(series["loss"][1][1])
    assert series["loss"][2:] == [(3, math.inf), (4, 1e308)]
    link = sqlite3.connect(tmp_path / "run.sqlite")
    nulls = link.execute("SELECT step FROM metrics WHERE value IS NULL").fetchall()
    link.close()
    assert nulls == [(2,)]


def test_findings_and_events(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "verysecretvalue")
    finding = Finding(step=1, id="P07", severity="warn", detail={"frac": 0.5, "x": math.nan})
    database.write_step(1, [], advantages=None, metrics={}, findings=[finding])
    database.write_event(1, "resumed", {"why": "with verysecretvalue", "path": str(Path.home())})
    (found,) = database.findings()
    assert (found.step, found.id, found.severity) == (1, "P07", "warn")
    assert found.detail == {"frac": 0.5, "x": "nan"}
    (event,) = database.events()
    assert (event.step, event.kind) == (1, "resumed")
    assert event.detail == {"why": "with [redacted]", "path": "~"}


def test_truncate_after_equals_never_having_gone_on(tmp_path: Path) -> None:
    def fill(database: Database, first: int, last: int) -> None:
        for step in range(first, last + 1):
            finding = Finding(step=step, id="P01", severity="note")
            database.write_step(
                step,
                [group(completion(str(step)))],
                advantages=torch.tensor([float(step)]),
                metrics={"m": step},
                findings=[finding],
            )
            database.write_evaluation(step, {"e": step}, [group(completion())])
            database.write_event(step, "saved", {})

    tables = ["metrics", "groups", "completions", "evaluations", "samples", "findings"]
    contents = []
    for name, parts in (("a", [(1, 5)]), ("b", [(1, 8), (4, 5)])):
        with Database(tmp_path / name) as database:
            database.write_evaluation(0, {"e": 0.0})
            for first, last in parts:
                if first > 1:
                    assert database.truncate_after(first - 1) == 5
                    assert database.last_step() == 3
                fill(database, first, last)
            assert len(database.events()) == 5
        link = sqlite3.connect(tmp_path / name)
        contents.append(
            [link.execute(f"SELECT * FROM {t} ORDER BY 1, 2").fetchall() for t in tables]
        )
        link.close()
    assert contents[0] == contents[1]
    assert len(contents[0][3]) == 6  # the evaluation before training stays


def test_evaluation_replaces_an_earlier_one(database: Database) -> None:
    database.write_evaluation(0, {"a": 1.0, "b": 2.0}, [group(completion("x"), completion("y"))])
    database.write_evaluation(0, {"a": 3.0}, [group(completion("z"))])
    assert database.evaluations() == {"a": [(0, 3.0)]}
    (sample,) = database.samples(0)
    assert (sample.text, sample.total, sample.answer, sample.finish) == ("z", 1.0, "4", "stop")


def test_detail_thins_samples_but_never_metrics(tmp_path: Path) -> None:
    groups = [group(completion("a"), name="p1"), group(completion("b"), name="p2")]
    with Database(
        tmp_path / "run.sqlite", detail=Detail(every=2, groups=1, tokens=False)
    ) as database:
        for step in range(1, 5):
            database.write_step(step, groups, advantages=torch.ones(2), metrics={"m": step})
        assert [len(database.completions(step)) for step in range(1, 5)] == [1, 0, 1, 0]
        assert [(c.step, c.problem) for c in database.iterate()] == [(1, "p1"), (3, "p1")]
        (row,) = database.completions(1)
        assert row.tokens is None
        assert (row.text, row.num_tokens, row.advantage) == ("a", 3, 1.0)
        assert len(database.metrics()["m"]) == 4


def test_detail_refuses_senseless_values() -> None:
    with pytest.raises(ValueError, match=r"record\.every = 0"):
        Detail(every=0)
    with pytest.raises(ValueError, match=r"record\.groups = -1"):
        Detail(groups=-1)


def test_export_takes_the_asked_steps_in_order(database: Database, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        groups = [group(completion("a"), completion("b")), group(completion("c"), name="p2")]
        database.write_step(step, groups, advantages=torch.arange(3.0), metrics={})
    assert export_samples(database, tmp_path / "x.jsonl", first=2, last=2) == 3
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [(r["step"], r["group"], r["row"], r["completion"]) for r in rows] == [
        (2, 0, 0, "a"),
        (2, 0, 1, "b"),
        (2, 1, 0, "c"),
    ]
    assert rows[2] == {
        "step": 2,
        "group": 1,
        "row": 0,
        "problem": "p2",
        "source": "a",
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}],
        "answer": "4",
        "completion": "c",
        "num_tokens": 3,
        "reward": 1.0,
        "task": 1.0,
        "parts": {},
        "counted": {},
        "advantage": 2.0,
        "finish": "stop",
        "interaction": None,
        "failure": None,
    }
    assert export_samples(database, tmp_path / "x.jsonl") == 9


def test_a_reader_sees_finished_steps_while_a_writer_is_at_work(tmp_path: Path) -> None:
    with Database(tmp_path / "run ?#%.sqlite") as writer:
        writer.write_step(1, [group(completion())], advantages=torch.ones(1), metrics={"m": 1.0})
        with Database(tmp_path / "run ?#%.sqlite", read_only=True) as reader:
            assert reader.last_step() == 1
            writer.write_step(2, [], advantages=None, metrics={"m": 2.0})
            assert reader.metrics() == {"m": [(1, 1.0), (2, 2.0)]}
            with pytest.raises(OSError, match="readonly"):
                reader.write_event(2, "x", {})
    assert [p.name for p in tmp_path.iterdir()] == ["run ?#%.sqlite"]  # the log is folded in


def test_files_that_cannot_be_used_are_os_errors_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "text.sqlite").write_text("hello " * 1000)
    with pytest.raises(OSError, match=r"text\.sqlite: .*not a database"):
        Database(tmp_path / "text.sqlite")
    with pytest.raises(OSError, match=r"none\.sqlite: .*unable to open"):
        Database(tmp_path / "none.sqlite", read_only=True)
    with Database(tmp_path / "new.sqlite"):
        pass
    link = sqlite3.connect(tmp_path / "new.sqlite")
    link.execute("PRAGMA user_version = 4")
    link.close()
    with pytest.raises(OSError, match=r"newer gruppo \(format 4, this one reads 3\)"):
        Database(tmp_path / "new.sqlite")


def test_a_step_that_is_there_already_is_our_bug_and_changes_nothing(database: Database) -> None:
    database.write_step(1, [], advantages=None, metrics={"m": 1.0})
    with pytest.raises(sqlite3.IntegrityError):
        database.write_step(1, [], advantages=None, metrics={"m": 2.0})
    assert database.metrics() == {"m": [(1, 1.0)]}


def shaped() -> Group:
    """Three completions of a part that is clipped to 1 and gated by another, and their scores."""
    values = {"big": [7.0, 0.5, 7.0], "ok": [1.0, 1.0, 0.0]}
    parts = (
        Part(name="ok", reward=lambda problem, rows: values["ok"]),
        Part(
            name="big",
            reward=lambda problem, rows: values["big"],
            clip=(0.0, 1.0),
            gate=Gate(part="ok", at=0.5),
        ),
    )
    rows = tuple(completion(text) for text in "abc")
    (scores,) = RewardSet(parts).score_groups([(group(*rows).problem, rows)])
    return group(*rows, scores=scores)


def test_raw_and_counted_values_of_a_clipped_and_gated_part(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with Database(path) as database:
        database.write_step(1, [shaped()], advantages=None, metrics={})
        stored = database.completions(1)
        assert export_samples(database, tmp_path / "out.jsonl") == 3
        nulls = database._link.execute("SELECT counted IS NULL FROM completions").fetchall()
    assert [row.parts for row in stored] == [
        {"ok": 1.0, "big": 7.0},
        {"ok": 1.0, "big": 0.5},
        {"ok": 0.0, "big": 7.0},
    ]
    assert [row.counted for row in stored] == [{"big": 1.0}, {}, {"big": 0.0}]
    assert [row.total for row in stored] == [2.0, 1.5, 0.0]
    assert [bool(value) for (value,) in nulls] == [False, True, False]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["counted"] for line in lines] == [{"big": 1.0}, {}, {"big": 0.0}]
    assert [line["parts"]["big"] for line in lines] == [7.0, 0.5, 7.0]


def test_a_file_from_before_counted_values_is_read_and_upgraded(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with Database(path) as database:
        database.write_step(1, [shaped()], advantages=None, metrics={})
        database._link.execute("ALTER TABLE completions DROP COLUMN counted")
        database._link.execute("PRAGMA user_version = 2")
    with Database(path, read_only=True) as database:
        assert [row.counted for row in database.iterate()] == [{}] * 3
    with Database(path) as database:
        database.write_step(2, [shaped()], advantages=None, metrics={})
        counted = [row.counted for row in database.iterate()]
    assert counted == [{}] * 3 + [{"big": 1.0}, {}, {"big": 0.0}]
