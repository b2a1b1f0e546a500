"""Ranges, gates and ramps of reward parts: what counts, by hand."""

import dataclasses
import math

import pytest
import torch

from gruppo.diagnose import composition_metrics
from gruppo.objective import Gdpo
from gruppo.recipe.check import check_section
from gruppo.recipe.mistakes import RecipeError
from gruppo.recipe.recipe import RewardSection
from gruppo.reward import Gate, Part, Ramp, RewardSet, ungraded
from gruppo.rollout import RolloutSettings, decode_group, encode_group, tensorise
from gruppo.train import train
from gruppo.types import Completion, Evidence, Group, Problem
from support.runs import run_of
from support.scores import count_failures

PROBLEM = Problem(id="p", prompt=(), answer="1")
DOWN = ungraded("down", "the judge is down")


def rows(count: int) -> tuple[Completion, ...]:
    one = Completion(
        tokens=(5,), logp=(-1.0,), mask=(True,), version=(0,), text="x", finish="stop"
    )  # fmt: skip
    return (one,) * count


def fixed(*values):
    return lambda problem, completions: list(values)


def test_format_must_hold_before_correctness_counts():
    rewards = RewardSet(
        (
            Part(name="right", reward=fixed(1.0, 1.0, 0.0, 0.0), gate=Gate(part="format")),
            Part(name="format", reward=fixed(1.0, 0.0, 1.0, 0.0), weight=0.5),
        )
    )
    scores = rewards.score(PROBLEM, rows(4))
    assert [s.total for s in scores] == [1.5, 0.0, 0.5, 0.0]
    # raw values stay as they were: the task metric and the logged part do not know the gate
    assert [s.task for s in scores] == [1.0, 1.0, 0.0, 0.0]
    assert [s.parts["right"] for s in scores] == [1.0, 1.0, 0.0, 0.0]
    assert [dict(s.counted) for s in scores] == [{}, {"right": 0.0}, {}, {}]


@pytest.mark.parametrize(("otherwise", "expected"), [(None, -2.0), (0.25, 0.5), (-0.5, -1.0)])
def test_a_closed_gate_counts_as_the_minimum_or_as_told(otherwise, expected):
    gate = Gate(part="format", at=0.5, otherwise=otherwise)
    right = Part(name="right", reward=fixed(1.0, 1.0), minimum=-1.0, weight=2.0, gate=gate)
    watched = Part(name="format", reward=fixed(0.5, 0.49), weight=0.0)
    assert [s.total for s in RewardSet((right, watched)).score(PROBLEM, rows(2))] == [2.0, expected]


def test_clip_comes_before_the_weight_and_the_gate_reads_raw_values():
    rewards = RewardSet(
        (
            Part(name="model", reward=fixed(14.0, -3.0, 2.0), weight=0.1, clip=(-1.0, 10.0)),
            Part(name="bonus", reward=fixed(1.0, 1.0, 1.0), gate=Gate(part="model", at=12.0)),
        )
    )
    scores = rewards.score(PROBLEM, rows(3))
    assert [s.total for s in scores] == pytest.approx([2.0, -0.1, 0.2], abs=1e-12)
    assert [dict(s.counted) for s in scores] == [
        {"model": 10.0},
        {"model": -1.0, "bonus": 0.0},
        {"bonus": 0.0},
    ]
    assert [s.parts["model"] for s in scores] == [14.0, -3.0, 2.0]


def test_a_failed_grader_matters_where_the_gate_is_open_and_always_as_the_gate():
    gate = Gate(part="format")
    task = Part(name="task", reward=fixed(1.0, 1.0, 1.0, 1.0))
    judge = Part(name="judge", reward=fixed(DOWN, DOWN, 0.5, 0.5), gate=gate)
    layout = Part(name="format", reward=fixed(1.0, 0.0, DOWN, None), weight=0.0)
    scores = RewardSet((task, judge, layout)).score(PROBLEM, rows(4))
    assert [s.total for s in scores] == [None, 1.0, None, 1.5]
    assert [s.task for s in scores] == [1.0] * 4
    assert count_failures(scores) == {"grader/down": 3}


def test_a_gated_shaping_term():
    rewards = RewardSet(
        (
            Part(name="right", reward=fixed(1.0, 0.0, 1.0)),
            Part(name="short", reward=fixed(0.3, 0.3, DOWN), shape=True, gate=Gate(part="right")),
        )
    )
    scores = rewards.score(PROBLEM, rows(3))
    assert [s.total for s in scores] == [1.3, 0.0, None]
    assert [dict(s.counted) for s in scores] == [{}, {"short": 0.0}, {}]


def test_weights_move_in_a_straight_line_of_the_steps_number():
    ramp = Ramp(to=0.0, from_step=10, to_step=20)
    rewards = RewardSet(
        (
            Part(name="right", reward=fixed(1.0)),
            Part(name="format", reward=fixed(1.0), weight=0.5, ramp=ramp),
        )
    )
    totals = [rewards.at(step).score(PROBLEM, rows(1))[0].total for step in (1, 10, 14, 20, 1000)]
    assert totals == pytest.approx([1.5, 1.5, 1.3, 1.0, 1.0], abs=1e-12)
    assert rewards.at(14).part_weights == pytest.approx((1.0, 0.3), abs=1e-12)
    plain = RewardSet(rewards.parts[:1])
    assert plain.at(7) is plain


def test_gdpo_normalises_what_counts():
    rewards = RewardSet(
        (
            Part(name="right", reward=fixed(1.0, 1.0), gate=Gate(part="format")),
            Part(name="format", reward=fixed(1.0, 0.0), weight=0.5),
        )
    )
    group = Group(
        problem=PROBLEM,
        prompt_tokens=(1,),
        completions=rows(2),
        scores=rewards.score(PROBLEM, rows(2)),
    )
    batch = tensorise([group], rewards, RolloutSettings())
    assert batch.parts.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    # each part: (1, 0) has mean 1/2 and deviation sqrt(1/2), so Z = ±sqrt(1/2), S = ±1.5 sqrt(1/2)
    # of deviation 1.5, so A = S / 1.5 = ±sqrt(1/2); raw, "right" would be dead and S a third
    advantage = Gdpo(eps=0.0)(batch, Evidence())
    half = math.sqrt(0.5)
    torch.testing.assert_close(advantage, torch.tensor([half, -half], dtype=torch.float64))
    raw = Gdpo(eps=0.0).weighted(batch)
    torch.testing.assert_close(raw, torch.tensor([1.5 * half, -1.5 * half], dtype=torch.float64))
    assert decode_group(encode_group(group)) == group


def test_what_is_logged_of_ranges_gates_and_ramps():
    parts = (
        Part(name="right", reward=fixed(1.0, 1.0, 0.0), gate=Gate(part="format")),
        Part(name="format", reward=fixed(1.0, 0.0, 0.0), ramp=Ramp(to=0.0, to_step=11)),
    )
    scores = RewardSet(parts).score(PROBLEM, rows(3))
    group = Group(problem=PROBLEM, prompt_tokens=(1,), completions=rows(3), scores=scores)
    assert composition_metrics([group], parts, step=6) == {
        "reward/right_counted_mean": pytest.approx(1 / 3),
        "reward/right_changed_frac": pytest.approx(1 / 3),
        "reward/format_weight": 0.5,
    }


def test_a_run_moves_the_weights_and_a_resumed_one_has_the_same(tiny_folder):
    def longer(problem, completions):
        return [float(sum(row.tokens) % 7) for row in completions]

    def ramped(**settings):
        run = run_of(tiny_folder, **settings)
        part = dataclasses.replace(run.rollouts.reward.parts[0], ramp=Ramp(to=3.0, to_step=3))
        extra = Part(name="extra", reward=longer, weight=0.1, ramp=Ramp(to=0.0, to_step=4))
        run.rollouts.reward = RewardSet((part, extra))
        return run

    whole = ramped(due=(2,))
    train(whole)
    notes = whole.keeper
    assert [notes.metrics[n]["reward/low_weight"] for n in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, 3.0]
    assert notes.metrics[4]["reward/extra_weight"] == 0.0
    state, weights, optimizer = notes.saved[2]
    again = ramped()
    again.policy.restore(weights, optimizer)
    again.rollouts.restore(state.rollouts)
    again.engine.load(None, again.policy.version)
    train(again, state)
    for name, tensor in notes.weights[4].items():
        assert torch.equal(tensor, again.keeper.weights[4][name])
    assert notes.metrics[3]["reward/total_mean"] == again.keeper.metrics[3]["reward/total_mean"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ramp(to=0.0, from_step=5, to_step=5), "from_step = 5, to_step = 5"),
        (lambda: Ramp(to=math.nan, to_step=5), "ramp.to = nan"),
        (lambda: Gate(part=""), "gate.part is empty"),
        (lambda: Gate(part="a", at=math.inf), "gate.at = inf"),
        (lambda: Part(name="a", reward=fixed(1.0), clip=(1.0, 1.0)), r"clip = \(1.0, 1.0\)"),
        (lambda: Part(name="a", reward=fixed(1.0), gate=Gate(part="a")), "names the part itself"),
        (
            lambda: RewardSet((Part(name="a", reward=fixed(1.0), gate=Gate(part="b")),)),
            "gate.part = 'b' is not the name",
        ),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def section(*parts):
    return check_section("reward", RewardSection, {"parts": list(parts)})


def test_gate_clip_and_ramp_in_a_recipe():
    number = {
        "name": "right", "kind": "number", "gate": {"part": "form"}, "clip": [0.0, 0.5],
    }  # fmt: skip
    form = {"name": "form", "kind": "format", "weight": 0.5, "ramp": {"to": 0.1, "to_step": 9}}
    built = section(number, form).value.build(max_tokens=9)
    assert built.parts[0].gate == Gate(part="form", at=1.0, otherwise=None)
    assert built.parts[0].clip == (0.0, 0.5)
    assert built.at(5).part_weights == pytest.approx((1.0, 0.3), abs=1e-12)


def test_mistakes_in_a_recipe_are_told_by_their_place():
    bad = {"name": "a", "kind": "number", "gate": {"prat": "b"}, "ramp": {"to": 1, "to_step": 0}}
    text = str(RecipeError(section(bad).mistakes, "r"))
    assert "reward.parts.0.gate.prat" in text
    assert "reward.parts.0.gate.part is required" in text.replace(":", "")
    assert "ramp.from_step = 1, to_step = 0" in text
