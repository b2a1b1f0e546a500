"""Section validation on small records: every kind of mistake, all at once."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Discriminator

from gruppo.recipe.check import check_section
from gruppo.recipe.fields import choices, hints, item_annotation, normalise, record_for

FORBID = {"extra": "forbid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    __pydantic_config__: ClassVar = FORBID
    kind: Literal["clip"] = "clip"
    low: float = 0.2
    high: float | None = 0.28

    def __post_init__(self) -> None:
        if self.low <= 0:
            raise ValueError(f"low = {self.low}: must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    __pydantic_config__: ClassVar = FORBID
    kind: Literal["plain"] = "plain"


Loss = Annotated[Clip | Plain, Discriminator("kind")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    __pydantic_config__: ClassVar = FORBID
    steps: int = 3
    name: str = "x"
    mode: Literal["none", "skip", "drop"] = "skip"
    betas: tuple[float, float] = (0.9, 0.95)
    k: tuple[int, ...] = (1,)
    loss: Loss = field(default_factory=Clip)
    extra: Loss | None = None
    losses: tuple[Loss, ...] = ()


def mistakes(data):
    return {found.path: str(found) for found in check_section("s", Section, data).mistakes}


def test_a_sound_table_becomes_the_record():
    checked = check_section(
        "s",
        Section,
        {"steps": 5, "betas": [0.5, 1], "loss": {"kind": "clip", "high": "none"}, "losses": []},
    )
    assert checked.mistakes == ()
    assert checked.value == Section(steps=5, betas=(0.5, 1.0), loss=Clip(high=None))


def test_a_bare_kind_stands_for_a_table():
    assert check_section("s", Section, {"loss": "plain"}).value == Section(loss=Plain())


def test_none_means_no_value_only_where_that_is_possible():
    value = check_section("s", Section, {"name": "none", "mode": "none", "extra": "none"}).value
    assert value == Section(name="none", mode="none", extra=None)


@pytest.mark.parametrize(
    ("data", "path", "words"),
    [
        ({"step": 3}, "s.step", 's.step = 3: unknown key; did you mean "steps"?'),
        ({"steps": "5"}, "s.steps", 's.steps = "5": must be a whole number'),
        ({"steps": True}, "s.steps", "must be a whole number"),
        ({"steps": 5.0}, "s.steps", "must be a whole number"),
        ({"name": 5}, "s.name", "must be text in quotes"),
        ({"mode": "skp"}, "s.mode", 'did you mean "skip"?'),
        ({"betas": [0.9]}, "s.betas.1", "is required"),
        ({"betas": [0.9, 0.9, 0.9]}, "s.betas", "too many"),
        ({"betas": 0.9}, "s.betas", "must be a list"),
        ({"k": [1, "2"]}, "s.k.1", "must be a whole number"),
        ({"loss": {"kind": "clp"}}, "s.loss.kind", 'did you mean "clip"?'),
        ({"loss": "plian"}, "s.loss.kind", 'did you mean "plain"?'),
        ({"loss": {"low": 1}}, "s.loss.kind", "is required: one of clip, plain"),
        ({"loss": 3}, "s.loss", "must be a table"),
        ({"loss": {"kind": "clip", "hgh": 1}}, "s.loss.hgh", 'did you mean "high"?'),
        ({"loss": {"kind": "clip", "low": -1}}, "s.loss", "low = -1.0: must be above 0"),
        ({"losses": [{"kind": "plain"}, {"kind": "clip", "lo": 1}]}, "s.losses.1.lo", '"low"'),
        ({"extra": {"kind": "clip", "low": "x"}}, "s.extra.low", "must be a number"),
    ],
)
def test_each_mistake_is_named_where_it_is(data, path, words):
    found = mistakes(data)
    assert list(found) == [path]
    assert words in found[path]


def test_all_mistakes_at_once_even_behind_one_another():
    found = mistakes(
        {
            "step": 3,
            "betas": [1, 2, 3],
            "loss": {"kind": "clip", "hgh": 1, "low": -1},  # the typo hides the bad value
            "losses": [{"kind": "clip", "low": 0}, {"kind": "no"}, {"kind": "clip", "low": -2}],
        }
    )
    assert set(found) == {
        "s.step",
        "s.betas",
        "s.loss.hgh",
        "s.loss",
        "s.losses.0",
        "s.losses.1.kind",
        "s.losses.2",
    }


def test_a_section_that_is_no_table():
    assert mistakes(3) == {"s": "s = 3: must be a table: [s]"}


def test_annotations_are_taken_apart():
    assert choices(Loss | None) == (Clip, Plain, type(None))
    assert record_for(Loss, {"kind": "plain"}) is Plain
    assert record_for(Loss, {"kind": "other"}) is None
    assert item_annotation(tuple[int, ...], 7) is int
    assert item_annotation(tuple[float, str], 1) is str
    assert list(hints(Clip)) == ["kind", "low", "high"]
    assert normalise(tuple[int | None, ...], ["none", 2]) == [None, 2]
