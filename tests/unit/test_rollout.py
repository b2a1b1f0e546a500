"""Rollouts: what is kept, what is drawn again, and what the tensors hold."""

import dataclasses
import json
import math

import pytest
import torch

from gruppo.data.stream import ProblemStream
from gruppo.errors import ServiceError
from gruppo.reward import KimiLength, LinearLength, Part, RewardSet, SoftOverlong
from gruppo.rollout import Rollouts, RolloutSettings, decode_group, encode_group, tensorise
from gruppo.types import Completion, Failure, Group, Message, Problem, Score

PROBLEMS = [
    Problem(id=str(n), prompt=(Message("user", f"{n}?"),), answer=str(n)) for n in range(12)
]


class Coder:
    """Encodes a prompt as its characters."""

    stop_tokens = (0,)

    def encode(self, messages):
        return tuple(ord(c) for c in messages[0].content)


class Scripted:
    """An engine that answers problem n right in the first ``n % 3`` samples of its group."""

    def __init__(self):
        self.requests = []

    def generate(self, requests, sampling):
        self.requests += requests
        return [
            tuple(
                row(chr(r.tokens[0]) if s < (r.tokens[0] - 48) % 3 else "no")
                for s in range(r.num_samples)
            )
            for r in requests
        ]

    def load(self, weights, version): ...

    def close(self): ...


def row(text, *, finish="stop", version=0):
    tokens = tuple(range(1, len(text) + 1))
    return Completion(
        tokens=tokens,
        logp=tuple(-0.5 for _ in tokens),
        mask=tuple(True for _ in tokens),
        version=tuple(version for _ in tokens),
        text=text,
        finish=finish,
    )


def right(problem, completions):
    return [float(c.text == problem.answer) for c in completions]


REWARD = RewardSet((Part(name="right", reward=right),))


def rollouts(**settings):
    settings = {"prompts_per_step": 4, "group_size": 2, "max_tokens": 8, **settings}
    return Rollouts(
        engine=Scripted(),
        encoder=Coder(),
        reward=REWARD,
        stream=ProblemStream([(PROBLEMS[:9], 1.0)], seed=0),
        settings=RolloutSettings(**settings),
        seed=7,
    )


def live_ids(groups):
    """Problems that are answered right by exactly one of two samples: n % 3 == 1."""
    return [int(group.problem.id) % 3 for group in groups]


def test_skip_keeps_dead_groups_in_the_batch():
    collected = rollouts(filter="skip").collect()
    assert len(collected.groups) == 4
    assert collected.groups == collected.generated
    assert collected.gen_batches == 1


def test_drop_takes_dead_groups_out_and_draws_no_more():
    collected = rollouts(filter="drop").collect()
    assert len(collected.generated) == 4
    assert live_ids(collected.groups) == [1] * len(collected.groups)
    assert len(collected.groups) == live_ids(collected.generated).count(1)


def test_resample_fills_the_batch_with_live_groups_in_prompt_order():
    made = rollouts(filter="resample")
    collected = made.collect()
    assert live_ids(collected.groups) == [1, 1, 1, 1]
    live = [group for group in collected.generated if group.is_live()]
    assert list(collected.groups) == live[:4]
    assert collected.gen_batches > 1
    # exactly the missing number is drawn each time, so nothing is left over
    assert made.surplus == tuple(live[4:]) == ()


def test_oversampling_keeps_the_surplus_for_the_next_step():
    made = rollouts(filter="resample", oversample=6.0)
    first = made.collect()
    surplus = made.surplus
    assert len(first.generated) == 24
    assert len(surplus) == live_ids(first.generated).count(1) - 4
    assert made.collect().groups[: len(surplus)] == surplus[:4]


@pytest.mark.parametrize("limit", ["use_partial", "error"])
def test_the_limit_of_resampling(limit):
    made = rollouts(filter="resample", prompts_per_step=9, max_gen_batches=1, on_limit=limit)
    if limit == "error":
        with pytest.raises(ServiceError, match="only 3 of 9 groups"):
            made.collect()
    else:
        assert len(made.collect().groups) == 3


def test_every_draw_has_a_key_of_its_own():
    made = rollouts()
    for _ in range(5):
        made.collect()
    keys = [request.key for request in made.engine.requests]
    assert len(set(keys)) == len(keys) == 20
    assert {key[0] for key in keys} == {7}


def test_a_restored_stream_continues_the_same_draws():
    made = rollouts(filter="resample", oversample=3.0)
    made.collect()
    state = json.loads(json.dumps(made.state()))
    expected = [made.collect().groups for _ in range(3)]
    other = rollouts(filter="resample", oversample=3.0)
    other.restore(state)
    assert [other.collect().groups for _ in range(3)] == expected


def test_greedy_baseline_is_the_reward_of_one_more_completion():
    made = rollouts(prompts_per_step=9)
    made.greedy_baseline = True
    collected = made.collect()
    baselines = {int(group.problem.id): group.baseline for group in collected.groups}
    # the first sample is right unless n % 3 == 0
    assert baselines == {n: float(n % 3 > 0) for n in range(9)}


class Told(Scripted):
    """Draws the rows that it is given, and the ``greedy`` one where temperature is 0."""

    def __init__(self, rows, greedy):
        super().__init__()
        self.rows, self.greedy = rows, greedy

    def generate(self, requests, sampling):
        rows = self.rows if sampling.temperature else (self.greedy,)
        return [rows for _ in requests]


def totals(rows, greedy, *shaping, **settings):
    """What one group's sampled rows and its baseline come to, in the tensors of credit."""
    made = rollouts(prompts_per_step=1, group_size=len(rows), filter="keep", **settings)
    made.engine = Told(rows, greedy)
    made.stream = ProblemStream([(PROBLEMS[1:2], 1.0)], seed=0)
    made.reward = RewardSet((*REWARD.parts, *shaping))
    made.greedy_baseline = True
    groups = made.collect().groups
    batch = tensorise(groups, made.reward, made.settings, greedy_baseline=True)
    return batch.total.tolist(), batch.baseline.item()


@pytest.mark.parametrize(
    "policy",
    [
        {"truncation": "none"},
        {"truncation": "mask_after"},
        {"truncation": "exclude_before"},
        {"truncation": "zero_reward"},
        {"truncation": "penalty", "truncation_penalty": -0.25},
        {"truncation": "penalty", "truncation_penalty": 0.5},
    ],
)
@pytest.mark.parametrize(
    "shaping",
    [SoftOverlong(max_tokens=8, buffer=6), KimiLength(), LinearLength()],
    ids=lambda record: record.kind,
)
@pytest.mark.parametrize("greedy", [0, 1, 2])
def test_the_greedy_baseline_is_the_same_function_as_a_sampled_total(greedy, shaping, policy):
    """A sampled row equal to the greedy one has exactly the baseline, so its advantage is 0."""
    rows = (row("1"), row("no, not", finish="length"), row("1", finish="length"))
    part = Part(name="length", reward=shaping, shape=True)
    sampled, baseline = totals(rows, rows[greedy], part, **policy)
    assert sampled[greedy] == pytest.approx(baseline, nan_ok=True)


def test_shaping_and_truncation_of_the_baseline_by_hand():
    """7 of 8 tokens with a buffer of 6: -5/6; a baseline cut off scores 0 or nothing."""
    overlong = Part(name="length", reward=SoftOverlong(max_tokens=8, buffer=6), shape=True)
    rows, cut = (row("1"), row("no")), row("no, not", finish="length")
    assert totals(rows, cut, overlong) == ([1.0, 0.0], pytest.approx(-5 / 6))
    assert totals(rows, cut, overlong, truncation="zero_reward")[1] == 0.0
    assert totals(rows, cut, truncation="penalty", truncation_penalty=-2.0)[1] == -2.0
    assert math.isnan(totals(rows, cut, truncation="exclude_before")[1])


def groups_with_truncation():
    problem = PROBLEMS[1]
    rows = (row("1"), row("no, it is", finish="length"))
    scores = (
        Score(total=1.0, task=1.0, parts={"right": 1.0}),
        Score(total=0.5, task=0.0, parts={"right": 0.0}),
    )
    return [Group(problem=problem, prompt_tokens=(49, 63), completions=rows, scores=scores)]


def test_tensors_hold_the_groups():
    batch = tensorise(groups_with_truncation(), REWARD, RolloutSettings())
    assert batch.prompts == ((49, 63),)
    assert batch.tokens.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0, 0], list(range(1, 10))]
    assert batch.mask.sum(dim=1).tolist() == [1, 9]
    assert batch.engine_logp[0].tolist() == [-0.5] + [0.0] * 8
    assert batch.length.tolist() == [1, 9]
    assert batch.truncated.tolist() == [False, True]
    assert batch.total.tolist() == [1.0, 0.5]
    assert batch.total.dtype == torch.float64
    assert batch.parts.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize(
    ("policy", "total", "trained"),
    [
        ({"truncation": "none"}, 0.5, 9),
        ({"truncation": "mask_after"}, 0.5, 0),
        ({"truncation": "exclude_before"}, math.nan, 9),
        ({"truncation": "zero_reward"}, 0.0, 9),
        ({"truncation": "penalty", "truncation_penalty": -0.25}, -0.25, 9),
        ({"truncation": "penalty", "truncation_penalty": 0.5}, 0.25, 9),
    ],
)
def test_truncation_policies(policy, total, trained):
    batch = tensorise(groups_with_truncation(), REWARD, RolloutSettings(**policy))
    assert batch.mask[1].sum() == trained
    assert batch.total[1].item() == pytest.approx(total, nan_ok=True)
    assert (batch.mask[0].sum(), batch.total[0]) == (1, 1.0)


def test_groups_survive_json():
    group = groups_with_truncation()[0]
    assert decode_group(json.loads(json.dumps(encode_group(group)))) == group


def test_what_is_buffered_tells_no_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    group = groups_with_truncation()[0]
    failure = Failure(kind="exception", fault="grader", text="/home/somebody/rewards.py:3 failed")
    score = Score(total=None, task=None, error=failure)
    plain = json.dumps(encode_group(dataclasses.replace(group, scores=(score, score))))
    assert "somebody" not in plain
    assert decode_group(json.loads(plain)).scores[0].error.text == "~/rewards.py:3 failed"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 0}, "group_size = 0"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"top_p": 0.9}, "top_p = 0.9"),
        ({"oversample": 0.5}, "oversample = 0.5"),
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RolloutSettings(**settings)
