"""Keys of recipes: each is explained by its record, and out of range it is refused by name."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from typing import get_args

import pytest

from gruppo.data.sources import Gym, Hub, Jsonl, Parquet, TaskSource, Verifiers, Verl
from gruppo.evaluate import EvalSettings
from gruppo.objective import (
    ExcludeBefore,
    KeepTruncated,
    MaskAfter,
    Penalty,
    Truncation,
    ZeroReward,
)
from gruppo.recipe import Recipe, load
from gruppo.recipe.fields import hints
from gruppo.reward import KINDS
from gruppo.rollout import RolloutSettings
from gruppo.types import Sampling


def records_in(annotation: object, found: dict[str, type]) -> dict[str, type]:
    """Every record of the package that a table under ``annotation`` may become, by its name."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        if annotation.__name__ not in found and not annotation.__name__.startswith("Wide"):
            found[annotation.__name__] = annotation
            for inner in hints(annotation).values():
                records_in(inner, found)
        return found
    for inner in get_args(annotation):
        records_in(inner, found)
    return found


def test_every_key_is_explained_in_the_docstring_of_its_record():
    records = records_in(Recipe, {})
    for flat in (*KINDS.values(), Gym, Hub, Jsonl, Parquet, TaskSource, Verifiers, Verl):
        records_in(flat, records)
    assert len(records) > 60
    silent = [
        f"{name}.{key.name}"
        for name, record in records.items()
        for key in fields(record)
        if key.name != "kind" and not re.search(rf"\b{key.name}\b", record.__doc__ or "")
    ]
    assert silent == []


OUT_OF_RANGE = [
    ({"top_p": 0.0}, "top_p = 0.0 keeps no token"),
    ({"top_p": 1.5}, "top_p = 1.5 keeps no token"),
    ({"top_k": -1}, "top_k = -1; use 0"),
    ({"min_p": 1.5}, "min_p = 1.5; use"),
    ({"stop": ("a", "")}, "stop holds an empty string"),
    ({"temperature": float("nan")}, "temperature = nan"),
    ({"temperature": 0.0}, "training needs samples that differ"),
    ({"oversample": float("inf")}, "oversample = inf"),
    ({"truncation_penalty": float("nan")}, "truncation_penalty = nan"),
]


@pytest.mark.parametrize(("given", "words"), OUT_OF_RANGE)
def test_rollout_settings_out_of_range(given, words):
    with pytest.raises(ValueError, match=words):
        RolloutSettings(allow_truncated_sampling=True, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"top_p": 0.0}, "top_p = 0.0 keeps no token"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"max_tokens": -1}, "max_tokens = -1"),
        ({"every": -1}, "every = -1: must not be negative"),
        ({"problems": -2}, "problems = -2: must not be negative"),
        ({"samples": -1, "k": ()}, "samples = -1: must not be negative"),
        ({"patience": -1}, "patience = -1: must not be negative"),
    ],
)
def test_eval_settings_out_of_range(given, words):
    with pytest.raises(ValueError, match=words):
        EvalSettings(**given)


def test_filters_of_the_sampler_reach_the_engine():
    settings = RolloutSettings(
        max_tokens=7,
        temperature=0.9,
        top_p=0.8,
        top_k=5,
        min_p=0.1,
        stop=("x",),
        allow_truncated_sampling=True,
    )
    assert settings.sampling((3, 4)) == Sampling(
        max_tokens=7,
        temperature=0.9,
        top_p=0.8,
        top_k=5,
        min_p=0.1,
        stop_tokens=(3, 4),
        stop=("x",),
    )


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("none", KeepTruncated()),
        ("mask_after", MaskAfter()),
        ("exclude_before", ExcludeBefore()),
        ("zero_reward", ZeroReward()),
        ("penalty", Penalty(value=0.3)),
    ],
)
def test_truncation_names_a_rule(name: str, rule: Truncation):
    assert RolloutSettings(truncation=name, truncation_penalty=0.3).truncated_rows == rule


def test_recipes_are_read_without_transformers():
    code = "import sys, gruppo.recipe as r; r.load('dapo'); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_control_run_differs_from_the_quickstart_by_its_reward_alone():
    quickstart, control = load("quickstart"), load("quickstart_random")
    assert replace(control, reward=quickstart.reward) == quickstart
    weights = {part.name: part.weight for part in control.reward.build(max_tokens=32).parts}
    assert weights == {"random": 1.0, "answer": 0.0, "format": 0.0, "tags": 0.0, "lenient": 0.0}
    assert control.reward.task == "answer"


def test_word_problems_are_the_quickstart_with_other_problems_and_sizes():
    quickstart, words = load("quickstart"), load("word_problems")
    (source,) = words.data.train
    assert (source.kind, source.name) == ("task", "word_problems")
    rollout = replace(quickstart.rollout, max_tokens=48, group_size=8)
    expected = replace(quickstart, rollout=rollout, train=replace(quickstart.train, steps=60))
    assert replace(words, data=quickstart.data) == expected
