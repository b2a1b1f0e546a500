"""Reading TOML, --set overrides, writing TOML back."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gruppo.recipe.mistakes import RecipeError, did_you_mean, mistake, nearest, show
from gruppo.recipe.source import find_unusable_numbers, override, parse, read
from gruppo.recipe.toml import write_toml

KEYS = st.text(min_size=1, max_size=5)
SCALARS = (
    st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8)
)
TABLES = st.recursive(
    st.dictionaries(KEYS, SCALARS, max_size=4),
    lambda inner: st.dictionaries(
        KEYS, SCALARS | inner | st.lists(inner | SCALARS, max_size=3), max_size=4
    ),
    max_leaves=12,
)


@given(TABLES)
def test_written_toml_reads_back_as_the_same_table(data):
    assert tomllib.loads(write_toml(data)) == data


def test_plain_values_are_written_before_sub_tables():
    text = write_toml({"sub": {"a": 1}, "top": [1.5, True], "rows": [{"n": "x"}, {"n": "y"}]})
    assert text == 'top = [1.5, true]\n\n[sub]\na = 1\n\n[[rows]]\nn = "x"\n\n[[rows]]\nn = "y"\n'


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("a.b=5", {"a": {"b": 5}}),
        ("a.b=0.5", {"a": {"b": 0.5}}),
        ("a.b=true", {"a": {"b": True}}),
        ("a.b=[1, 8]", {"a": {"b": [1, 8]}}),
        ('a.b={kind = "rloo"}', {"a": {"b": {"kind": "rloo"}}}),
        ("a.b=some/model-name", {"a": {"b": "some/model-name"}}),
        ('a.b="5"', {"a": {"b": "5"}}),
        ("a.b=x=y", {"a": {"b": "x=y"}}),
        ("a.b=", {"a": {"b": ""}}),
        ("a.b=1\nc = 2", {"a": {"b": "1\nc = 2"}}),  # no second key is smuggled in
        ("a.b.c.d=1", {"a": {"b": {"c": {"d": 1}}}}),
    ],
)
def test_override_value(setting, expected):
    assert override({}, [setting]) == expected


def test_override_reaches_list_entries_by_number_and_by_name():
    data = {"reward": {"parts": [{"name": "answer", "weight": 1.0}, {"name": "format"}]}}
    got = override(data, ["reward.parts.format.weight=0.2", "reward.parts.0.weight=0.6"])
    assert got["reward"]["parts"] == [
        {"name": "answer", "weight": 0.6},
        {"name": "format", "weight": 0.2},
    ]
    assert data["reward"]["parts"][0]["weight"] == 1.0  # the original is left alone


def test_last_override_of_a_key_wins():
    assert override({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.steps", "section.key=value"),
        ("=5", "section.key=value"),
        ("train..x=5", "section.key=value"),
        ("train.steps.more=5", "holds a value, not a table"),
        ("list.answr=5", 'did you mean "answer"?'),
        ("a.b=[1, 2", "not valid TOML"),
    ],
)
def test_bad_override_is_refused_with_the_reason(setting, words):
    data = {"train": {"steps": 1}, "list": [{"name": "answer"}]}
    with pytest.raises(RecipeError) as caught:
        override(data, [setting])
    assert words in str(caught.value)


def test_all_bad_overrides_are_reported_at_once():
    with pytest.raises(RecipeError) as caught:
        override({}, ["nonsense", "a.b=1", "x.y=[1"])
    assert len(caught.value.mistakes) == 2


def test_syntax_error_names_the_line():
    with pytest.raises(RecipeError, match="line 2"):
        parse("[train]\nsteps = = 3\n", "my.toml")


def test_read_refuses_what_is_no_text_file(tmp_path: Path):
    binary = tmp_path / "x.toml"
    binary.write_bytes(b"[train]\nname = '\xff'\n")
    with pytest.raises(RecipeError, match=r"line 2: is not UTF-8"):
        read(str(binary))
    with pytest.raises(RecipeError, match="not a regular file"):
        read(str(tmp_path))
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        read(str(large))


def test_read_of_an_unknown_name_suggests_a_packaged_recipe():
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        read("quikstart")


def test_unusable_numbers_are_found_with_their_paths():
    data = {"a": {"b": [1.0, float("nan")], "c": float("-inf")}, "d": 2**60, "e": True}
    assert [found.path for found in find_unusable_numbers(data)] == ["a.b.1", "a.c", "d"]


def test_nearest_ignores_case_and_dashes_and_gives_none_when_nothing_is_close():
    assert nearest("Group-Size", ["group_size", "stop"]) == "group_size"
    assert nearest("zebra", ["group_size", "stop"]) is None
    assert did_you_mean("zebra", ["b", "a"], "key") == "unknown key; known: a, b"


def test_problem_shows_where_what_and_why():
    assert str(mistake("a.b", "is wrong", "x")) == 'a.b = "x": is wrong'
    assert str(mistake("a.b", "is required")) == "a.b: is required"
    assert len(show("y" * 500)) == 60
