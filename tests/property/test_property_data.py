"""Properties of the data layer on random inputs."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from gruppo.data import Curriculum, Jsonl, ProblemStream, Prompting, split
from gruppo.data.jsonl import parse_exact, parse_line
from gruppo.data.keyed import permutation
from gruppo.types import Message, Problem

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
SCALAR = st.none() | st.booleans() | TEXT | st.integers(-(10**40), 10**40)
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
)
ROW = st.fixed_dictionaries(
    {"question": TEXT, "answer": TEXT | st.integers(-(10**40), 10**40)},
    optional={"extra": VALUE, "more": VALUE},
)
QUICK = settings(max_examples=30, deadline=None)


def problem(name, text, keys=()):
    prompt = (Message("user", text),)
    return Problem(id=name, prompt=prompt, info={"split_key": list(keys)} if keys else {})


@QUICK
@given(
    rows=st.lists(ROW, min_size=1, max_size=6),
    ascii_only=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_json_writes_is_read_back_exactly(tmp_path_factory, rows, ascii_only, end):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    path.write_bytes(text.encode())
    loaded = Jsonl(path=str(path)).load()
    assert [p.prompt[0].content for p in loaded] == [row["question"] for row in rows]
    assert [p.answer for p in loaded] == [str(row["answer"]) for row in rows]
    for row, p in zip(rows, loaded, strict=True):
        assert p.info == {key: row[key] for key in row if key not in ("question", "answer")}
    assert len({p.id for p in loaded}) == len(rows)
    assert list(Jsonl(path=str(path), streaming=True).load()) == loaded


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_a_row_or_a_value_error(data):
    for parse in (parse_line, parse_exact):
        try:
            row = parse(data)
        except ValueError:
            continue
        assert json.loads(json.dumps(row)) == row


@QUICK
@given(question=TEXT, system=st.none() | TEXT, before=TEXT, after=TEXT)
def test_templates_put_text_in_unchanged(question, system, before, after):
    def escape(text):
        return text.replace("{", "{{").replace("}", "}}")

    ask = Prompting(system=system, template=escape(before) + "{question}" + escape(after))
    prompt = ask({"question": question})
    assert prompt[-1].content == before + question + after
    assert len(prompt) == 1 + (system is not None)


@QUICK
@given(
    groups=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), min_size=4, max_size=40),
    wanted=st.integers(1, 25),
    seed=st.integers(0, 5),
)
def test_split_never_straddles(groups, wanted, seed):
    problems = [
        problem(f"p{i}", f"t{text}", [f"k{key}"] if key < 4 else [])
        for i, (text, key) in enumerate(groups)
    ]
    problems += [problem(f"free{i}", f"free {i}") for i in range(30)]  # so that a split exists
    train, held_out = split(problems, wanted, seed=seed)
    assert len(held_out) == wanted
    assert train
    assert {p.prompt for p in train} & {p.prompt for p in held_out} == set()
    assert {p.id for p in train} & {p.id for p in held_out} == set()
    assert split(problems, wanted, seed=seed) == (train, held_out)


@QUICK
@given(size=st.integers(1, 300), key=st.integers())
def test_permutation_is_one(size, key):
    assert sorted(permutation(size, key).tolist()) == list(range(size))


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    stop=st.integers(0, 12),
    rates=st.lists(st.floats(0, 0.85), min_size=4, max_size=4),
    floor=st.none() | st.floats(0.05, 1.0),
    seed=st.integers(0, 3),
)
def test_resume_is_exact_anywhere(sizes, stop, rates, floor, seed):
    data = [
        ([problem(f"{n}-{i}", f"{n} {i}") for i in range(size)], float(n + 1))
        for n, size in enumerate(sizes)
    ]
    steering = Curriculum(floor=floor, drop_pass_rate=0.9)

    def run(stream, steps):
        names = []
        for _ in range(steps):
            (p,) = stream.draw(1)
            stream.record(p, rates[stream.drawn % 4])
            names.append(p.id)
        return names

    whole = ProblemStream(data, seed=seed, curriculum=steering)
    first = run(whole, stop)
    state = json.loads(json.dumps(whole.state()))
    resumed = ProblemStream(data, seed=seed, curriculum=steering)
    resumed.restore(state)
    rest = run(whole, 8)
    assert run(resumed, 8) == rest
    assert resumed.state() == whole.state()
    assert run(ProblemStream(data, seed=seed, curriculum=steering), stop + 8) == first + rest
