"""Prompting, column mapping, ids, and every kind of source on files the test writes."""

import json
import math
import re
import sys
from datetime import date, datetime
from decimal import Decimal
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gruppo.data import Columns, Gym, Hub, Jsonl, Parquet, Prompting, TaskSource, Verl, load
from gruppo.data.rows import as_json
from gruppo.policy.files import encode_json
from gruppo.types import Message


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(prompt):
    return [(message.role, message.content) for message in prompt]


def test_prompting_puts_system_examples_and_question_in_order():
    ask = Prompting(
        system="Be brief.",
        template="{{Q}} {question}!",
        examples=(("1 + 1", "2"), ("2 + 2", "4")),
    )
    assert pairs(ask({"question": "3 + 3 {not a field}"})) == [
        ("system", "Be brief."),
        ("user", "{Q} 1 + 1!"),
        ("assistant", "2"),
        ("user", "{Q} 2 + 2!"),
        ("assistant", "4"),
        ("user", "{Q} 3 + 3 {not a field}!"),
    ]


def test_template_takes_any_column_and_prints_numbers_exactly():
    ask = Prompting(template="{topic} / {extra info}: {question}")
    prompt = ask({"question": "why", "topic": 10**30, "extra info": "x"})
    assert prompt[-1].content == "1" + "0" * 30 + " / x: why"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("no place", "has no placeholder"),
        ("{question.__class__}", None),
        ("{question[0]}", "{question[0]} is not a column"),
        ("{question!r}", "{question!r} is not a column"),
        ("{question:>99999999}", "{question:>99999999} is not a column"),
        ("\\boxed{} {question}", "{} is not a column"),
        ("{question", "is not a template"),
    ],
)
def test_templates_print_columns_and_nothing_else(template, text):
    if text is None:  # a dotted name is a column name, never an attribute
        with pytest.raises(ValueError, match=r"field 'question\.__class__': the template asks for"):
            Prompting(template=template)({"question": "x"})
        return
    with pytest.raises(ValueError, match=re.escape(text)):
        Prompting(template=template)


def test_examples_need_a_template_they_can_fill():
    with pytest.raises(ValueError, match=r"the template needs \{topic\}"):
        Prompting(template="{topic} {question}", examples=(("a", "b"),))


def test_missing_column_is_named_with_those_there():
    with pytest.raises(ValueError, match=r"field 'level': .* only hint, question"):
        Prompting(template="{level}{question}")({"question": "q", "hint": "h"})


def test_jsonl_keeps_values_as_written(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"question": "2024-01-02", "answer": 123456789012345678901234567890, '
        b'"when": "1/2/2024", "n": 123456789012345678901234567890, "x": 0.5}\r\n'
        b"\r\n"
        b'{"question": "q2", "answer": 0.10, "when": "NaN", "n": 1E5, "x": null}'
    )
    first, second = Jsonl(path=str(path)).load()
    assert first.prompt == (Message("user", "2024-01-02"),)
    assert first.answer == "123456789012345678901234567890"
    assert first.info == {"when": "1/2/2024", "n": 123456789012345678901234567890, "x": 0.5}
    assert (second.answer, second.info["when"], second.info["x"]) == ("0.10", "NaN", None)
    assert {first.source, second.source} == {"mine"}


def test_column_mapping_with_dots_and_label(tmp_path):
    path = write(tmp_path / "a.jsonl", {"t": {"q": "Q"}, "a.b": "A", "key": 7, "more": [1]})
    source = Jsonl(path=path, columns=Columns(question="t.q", answer="a.b", id="key"), label="L")
    (problem,) = load(source)
    assert (problem.id, problem.answer, problem.source) == ("7", "A", "L")
    assert problem.prompt == (Message("user", "Q"),)
    assert problem.info == {"t": {"q": "Q"}, "more": [1]}


def test_no_answer_column(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "Q", "answer": "kept"})
    (problem,) = Jsonl(path=path, columns=Columns(answer=None)).load()
    assert problem.answer is None
    assert problem.info == {"answer": "kept"}


def test_a_chat_as_question(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    chat.append({"role": "user", "content": "go"})
    path = write(tmp_path / "a.jsonl", {"question": chat, "answer": "A"})
    (problem,) = Jsonl(path=path, prompting=Prompting(system="S")).load()
    assert pairs(problem.prompt) == [
        ("system", "S"), ("user", "hi"), ("assistant", "yes?"), ("user", "go"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="field 'question': is a chat"):
        Jsonl(path=path, prompting=Prompting(template="T {question}")).load()


def test_ids_depend_on_content_alone(tmp_path):
    rows = [{"question": "a", "answer": "1", "n": i} for i in range(3)]
    rows += [{"question": "a", "answer": "2"}, {"question": "b", "answer": "1"}]
    path = write(tmp_path / "a.jsonl", *rows)
    ids = [problem.id for problem in Jsonl(path=path).load()]
    assert len(set(ids)) == 5
    assert ids[1:3] == [ids[0] + "-2", ids[0] + "-3"]
    asked = Jsonl(path=path, prompting=Prompting(system="S", template="Please: {question}"))
    assert [problem.id for problem in asked.load()] == ids
    again = write(tmp_path / "b.jsonl", *reversed(rows))
    assert sorted(problem.id for problem in Jsonl(path=again).load()) == sorted(ids)


@pytest.mark.parametrize("column", [None, "key"])
def test_streamed_rows_equal_loaded_rows(tmp_path, column):
    rows = [{"question": f"q{i % 7}", "answer": i % 3, "key": f"k{i}"} for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows))
    columns = Columns(id=column)
    loaded = Jsonl(path=str(path), columns=columns).load()
    streamed = Jsonl(path=str(path), columns=columns, streaming=True).load()
    assert len(streamed) == 40
    assert list(streamed) == loaded
    assert [streamed[i] for i in (39, 0, 20)] == [loaded[i] for i in (39, 0, 20)]
    with pytest.raises(IndexError):
        streamed[40]


def test_parquet_rows(tmp_path):
    table = pa.table(
        {
            "question": ["a", "b"],
            "answer": pa.array([Decimal("0.10"), Decimal("2.00")]),
            "day": pa.array([date(2024, 1, 2), None]),
            "tags": [["x"], []],
        }
    )
    path = tmp_path / "d.parquet"
    pq.write_table(table, path, row_group_size=1)
    first, second = Parquet(path=str(path)).load()
    assert (first.answer, second.answer) == ("0.10", "2.00")
    assert first.info == {"day": "2024-01-02", "tags": ["x"]}
    assert second.info == {"day": None, "tags": []}
    lines = write(
        tmp_path / "d.jsonl",
        {"question": "a", "answer": "0.10"},
        {"question": "b", "answer": "2.00"},
    )
    assert [p.id for p in Jsonl(path=lines).load()] == [first.id, second.id]


def test_further_columns_are_what_a_checkpoint_can_hold(tmp_path):
    """Groups that wait for the next step are saved with their problems, as JSON."""
    table = pa.table(
        {
            "question": ["q"],
            "answer": ["a"],
            "spans": pa.array([[{"day": date(2024, 1, 2), "price": Decimal("0.10")}]]),
            "score": [float("nan")],
        }
    )
    pq.write_table(table, tmp_path / "d.parquet")
    (problem,) = Parquet(path=str(tmp_path / "d.parquet")).load()
    assert problem.info == {"spans": [{"day": "2024-01-02", "price": "0.10"}], "score": None}
    (copy,) = json.loads(encode_json([dict(problem.info)]))
    assert copy == problem.info


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (np.array([[1, 2]]), [[1, 2]]),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.float32(0.5), 0.5),
        (np.float64("nan"), None),
        (datetime(2024, 1, 2, 3, 4), "2024-01-02T03:04:00"),
        ({"a": (1, Decimal("2.50"))}, {"a": (1, "2.50")}),
        ({3, 1, 2}, [1, 2, 3]),
        ({1: "x"}, {1: "x"}),
    ],
)
def test_a_value_becomes_what_json_can_hold(value, kept):
    assert as_json(value) == kept
    assert type(as_json(value)) is type(kept)
    encode_json(as_json(value))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"x", "holds a bytes, which JSON cannot"),
        ([object()], "holds a object"),
        ({"a": -math.inf}, "holds -inf"),
        ({(1, 2): "x"}, "keys are no text"),
        ({1: "x", "a": "y"}, "keys are no text"),
    ],
)
def test_a_value_that_json_cannot_hold_is_refused(value, text):
    with pytest.raises(ValueError, match=text):
        as_json(value)


def verl_rows():
    """Rows as verl's preprocessing of GSM8K writes them."""
    return [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"split": "train", "index": i, "answer": f"#### {2 * i}"},
        }
        for i in range(3)
    ]


def test_verl_parquet_has_the_same_content(tmp_path):
    rows = verl_rows()
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    problems = Verl(path=str(path)).load()
    for row, problem in zip(rows, problems, strict=True):
        assert pairs(problem.prompt) == [("user", row["prompt"][0]["content"])]
        assert problem.answer == row["reward_model"]["ground_truth"]
        assert problem.source == row["data_source"]
        assert {**problem.info, "prompt": row["prompt"]} == row
    labelled = Verl(path=str(path), system="S", label="mine").load()
    assert pairs(labelled[0].prompt)[0] == ("system", "S")
    assert labelled[0].source == "mine"


@pytest.mark.parametrize("truth", [["x", "y"], {"inputs": "1"}, None, True])
def test_verl_ground_truth_that_is_no_text_stays_in_info(tmp_path, truth):
    rows = verl_rows()[:1]
    rows[0]["reward_model"]["ground_truth"] = truth
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    (problem,) = Verl(path=str(path)).load()
    assert problem.answer is None
    assert problem.info["reward_model"]["ground_truth"] == truth


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": "text"}, "row 1: field 'prompt': is not a list of messages"),
        ({"prompt": [{"role": "user"}]}, "row 1: field 'prompt': message 1 needs"),
        ({"reward_model": {"style": "rule"}}, "field 'reward_model.ground_truth': missing"),
    ],
)
def test_verl_bad_rows(tmp_path, change, text):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([{**verl_rows()[0], **change}]), path)
    with pytest.raises(ValueError, match=re.escape(text)):
        Verl(path=str(path)).load()


def test_hub_passes_names_on_and_maps_columns(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"problem": "Q", "solution": 4, "level": "5"}])

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    columns = Columns(question="problem", answer="solution")
    source = Hub(name="a/b", config="main", split="test", revision="abc", columns=columns)
    (problem,) = source.load()
    assert calls == [(("a/b", "main"), {"split": "test", "revision": "abc"})]
    assert (problem.answer, problem.info, problem.source) == ("4", {"level": "5"}, "a/b")


class FakeGym(ModuleType):
    def create_dataset(self, task, size, seed, **options):
        if task != "sums":
            raise ValueError(f"Dataset '{task}' not registered")
        answers = [str(seed + i) if options["known"] else None for i in range(size)]
        return [
            {"question": f"q{i}", "answer": answer, "metadata": {"i": i}}
            for i, answer in enumerate(answers)
        ]


@pytest.mark.parametrize(("known", "answers"), [(True, ["5", "6"]), (False, [None, None])])
def test_gym_keeps_the_entry_for_scoring(monkeypatch, known, answers):
    monkeypatch.setitem(sys.modules, "reasoning_gym", FakeGym("reasoning_gym"))
    problems = Gym(task="sums", size=2, seed=5, options={"known": known}).load()
    assert [p.answer for p in problems] == answers
    assert problems[1].info["entry"] == {
        "question": "q1",
        "answer": answers[1],
        "metadata": {"i": 1},
    }
    assert (problems[0].info["task"], problems[0].source) == ("sums", "sums")


def test_gym_refuses_unknown_and_unrepeatable_tasks(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", FakeGym("reasoning_gym"))
    with pytest.raises(ValueError, match="'nope': Dataset 'nope' not registered"):
        Gym(task="nope").load()
    with pytest.raises(ValueError, match="differs from run to run"):
        Gym(task="codeio")


@pytest.mark.parametrize(
    ("module", "extra", "source"),
    [
        ("datasets", "hub", Hub(name="a/b")),
        ("reasoning_gym", "gym", Gym(task="x")),
        ("pyarrow", "parquet", Parquet(path="{file}")),
    ],
)
def test_missing_extra_is_named(monkeypatch, tmp_path, module, extra, source):
    monkeypatch.setitem(sys.modules, module, None)
    file = tmp_path / "x.parquet"
    file.write_bytes(b"PAR1")
    if isinstance(source, Parquet):
        source = Parquet(path=str(file))
    with pytest.raises(ValueError, match=re.escape(f'pip install "gruppo[{extra}]"')):
        source.load()


def test_task_source_settings():
    source = TaskSource(
        name="word_problems",
        size=3,
        options={"operations": ["add"], "high": 5},
        prompting=Prompting(template="[{operation}] {question}"),
        label="sums",
    )
    for problem in source.load():
        assert problem.prompt[0].content.startswith("[add] ")
        assert problem.source == "sums"
        _, a, b = problem.info["split_key"][0].split()
        assert int(a) + int(b) == int(problem.answer)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"name": "wordproblems"}, "name: 'wordproblems' is no task; use one of arithmetic"),
        ({"name": "letters", "options": {"cuont": 2}}, "letters has no 'cuont'; it has count"),
        (
            {"name": "letters", "options": {"count": "2"}},
            "count = '2' is of the wrong type; write it like 1",
        ),
        (
            {"name": "arithmetic", "options": {"operations": "+"}},
            "operations = '+' is of the wrong type",
        ),
        (
            {"name": "arithmetic", "options": {"low": 2.5}},
            "low = 2.5 is of the wrong type; write it like 2",
        ),
        ({"name": "countdown", "options": {"max_target": 5}}, "max_target: 5 must be"),
        ({"name": "letters", "size": 0}, "size: 0 must be at least 1"),
    ],
)
def test_task_source_refuses_bad_settings_before_loading(settings, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        TaskSource(**settings)
