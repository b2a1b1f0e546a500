"""Episodes in rollouts and evaluations: scores, tensors, metrics, and what is stored of them."""

import dataclasses
import json
import math

import pytest
import torch

from gruppo.data.stream import ProblemStream
from gruppo.diagnose import episode_metrics, length_metrics
from gruppo.environment import Episodes, Limits, Reply
from gruppo.evaluate import EvalSettings, Evaluator
from gruppo.objective import Opo
from gruppo.objective.masks import foreign
from gruppo.record import Database
from gruppo.reward import EnvironmentReward, Part, Repetition, RewardSet, SoftOverlong, ToolUse
from gruppo.rollout import Rollouts, RolloutSettings, decode_group, encode_group, tensorise
from gruppo.types import Completion, Evidence, Interaction, Message, Sampling
from support.dialogues import Letters, Script, Talk, problem, same

TURNS = {"p": [["a", "b"], ["b"]], "q": [["a", "a", "b"], ["boom"]]}


def crash():
    raise KeyError("lost")


ANSWERS = {"a": Reply(messages=(Message("tool", "!"),), calls=2, failed_calls=1), "boom": crash}
REWARD = RewardSet(
    (
        Part(name="env", reward=EnvironmentReward()),
        Part(name="used", reward=ToolUse(), weight=0.25),
    )
)


def parts(reward=REWARD):
    engine = Script(TURNS)
    sampler = Episodes(
        engine=engine,
        environment=Talk(ANSWERS, worth=0.5),
        encoder=Letters(),
        limits=Limits(max_seconds=5.0),
    )
    return {"engine": engine, "encoder": Letters(), "reward": reward, "sampler": sampler}


SETTINGS = RolloutSettings(prompts_per_step=2, group_size=2, max_tokens=40)


def collect(greedy_baseline=False):
    rollouts = Rollouts(
        **parts(),
        stream=ProblemStream([([problem("p"), problem("q")], 1.0)], seed=0),
        settings=SETTINGS,
        seed=7,
        greedy_baseline=greedy_baseline,
    )
    return sorted(rollouts.collect().groups, key=lambda group: group.problem.id)


def test_rollouts_draw_episodes_and_leave_broken_ones_unscored():
    first, second = collect()
    assert [s.total for s in first.scores] == [0.75, 0.5]
    used, broken = second.scores
    assert (used.total, used.parts) == (0.75, {"env": 0.5, "used": 1.0})
    assert (broken.total, broken.task, broken.parts) == (None, None, {"env": None, "used": None})
    assert (broken.error.kind, broken.error.fault) == ("environment", "grader")
    assert broken.error.text == "reply: KeyError: 'lost'"


def test_the_greedy_baseline_is_an_episode_too():
    assert [group.baseline for group in collect(greedy_baseline=True)] == [0.75, 0.75]


def test_without_an_episode_the_environments_reward_is_unscored():
    row = Completion(tokens=(), logp=(), mask=(), version=(), text="", finish="stop")
    (score,) = REWARD.score(problem("p"), [row])
    assert (score.total, score.error.kind) == (None, "environment_silent")


def test_tensors_train_the_policys_tokens_only():
    groups = collect()
    rollout = tensorise(groups, REWARD, SETTINGS)
    # "a" END | 1 ! 2 | "b" END, and twice that much talk in the third row
    turn, heard = [True, True], [False] * 3
    wanted = [[*turn, *heard, *turn], turn, [*turn, *heard, *turn, *heard, *turn], [True] * 5]
    for row, mask in zip(rollout.mask.tolist(), wanted, strict=True):
        assert row[: len(mask)] == mask
        assert not any(row[len(mask) :])
    assert rollout.length.tolist() == [7, 2, 12, 5]
    known = ~rollout.engine_logp.isnan() & (rollout.engine_logp != 0)
    assert torch.equal(known, rollout.mask)


def test_metrics_of_episodes():
    metrics = episode_metrics(collect())
    assert metrics == pytest.approx(
        {
            "env/turns": (2 + 1 + 3 + 1) / 4,
            "env/calls": (2 + 0 + 4 + 0) / 4,
            "env/failed_call_frac": 3 / 6,
            "env/tool_use_frac": 2 / 4,
            "env/limit_frac": 0.0,
            "env/error_frac": 1 / 4,
            "env/token_frac": 9 / 26,
        }
    )


def test_evaluation_shows_turns_and_tool_use():
    evaluator = Evaluator(
        **parts(),
        problems=(problem("p"), problem("q")),
        settings=EvalSettings(samples=2, k=(1,), correct_at=0.5),
        sampling=Sampling(max_tokens=40),
    )
    evaluation = evaluator()
    assert evaluation.metrics["pass@1"] == 1.0
    assert evaluation.metrics["turns"] == 2.5
    assert evaluation.metrics["len"] == 5.0  # the policy's own: 4 of 7, and 6 of 12
    assert evaluation.metrics["tool_use"] == 1.0
    assert evaluation.metrics["env_error_frac"] == 0.0
    # of the four drawn, the broken one is not right
    assert evaluation.metrics["sampled/avg@2"] == 0.75


def test_lengths_and_repetition_are_of_the_policys_own_tokens():
    row = collect()[1].completions[0]
    assert len(row.own_tokens) == 6
    assert SoftOverlong(max_tokens=12, buffer=8)(problem("q"), [row]) == [-0.25]
    seen = length_metrics(tensorise(collect(), REWARD, SETTINGS))
    assert (seen["len/mean"], seen["len/max"]) == ((4 + 2 + 6 + 5) / 4, 6.0)
    # a END a END b END: four of the five pairs differ
    assert Repetition(n=2)(problem("q"), [row]) == [pytest.approx(-0.2)]


def long_talk(answer):
    """Two completions of one own token each; the second hears ``answer`` before it."""
    rows = []
    for heard in ((), answer):
        own = len(heard)
        rows.append(
            Completion(
                tokens=(5, *heard, 6),
                logp=(-1.0, *[math.nan] * own, -1.0),
                mask=(True, *[False] * own, True),
                version=(0,) * (own + 2),
                text="",
                finish="stop",
            )
        )
    return rows


def test_what_an_environment_says_weighs_nothing_in_lengths():
    rows = long_talk((9, 9, 9, 9) * 4)
    group = collect()[0]
    values = (group.scores[0], group.scores[1])
    made = type(group)(
        problem=group.problem, prompt_tokens=(1,), completions=tuple(rows), scores=values
    )
    rollout = tensorise([made], REWARD, SETTINGS)
    # equal own lengths: the plain mean 0.625 is the length-weighted one
    assert Opo()(rollout, Evidence()).tolist() == pytest.approx([0.125, -0.125])
    assert length_metrics(rollout)["rep/frac"] == 0.0


def test_groups_come_back_from_a_checkpoint_as_they_were():
    for group in collect():
        plain = json.loads(json.dumps(encode_group(group)))
        again = decode_group(plain)
        assert again.scores == group.scores
        assert all(same(a, b) for a, b in zip(again.completions, group.completions, strict=True))
    for item in plain["completions"]:
        del item["interaction"]  # as an earlier gruppo wrote it
    assert [row.interaction for row in decode_group(plain).completions] == [None, None]


def test_the_record_keeps_the_dialogue(tmp_path):
    groups = collect()
    with Database(tmp_path / "run.sqlite") as database:
        database.write_step(1, groups, advantages=torch.zeros(4), metrics={})
    with Database(tmp_path / "run.sqlite", read_only=True) as database:
        stored = list(database.iterate())
    assert [row.interaction for row in stored] == [
        completion.interaction for group in groups for completion in group.completions
    ]
    assert stored[0].interaction == Interaction(
        messages=(Message("assistant", "a"), Message("tool", "!"), Message("assistant", "b")),
        ended="environment",
        calls=2,
        failed_calls=1,
        reward=0.5,
    )
    assert stored[0].tokens.mask == groups[0].completions[0].mask


def test_a_database_of_an_earlier_version_is_read_and_upgraded(tmp_path):
    path = tmp_path / "run.sqlite"
    groups = collect()
    with Database(path) as database:
        database.write_step(1, groups, advantages=None, metrics={})
        for column in ("interaction", "counted"):
            database._link.execute(f"ALTER TABLE completions DROP COLUMN {column}")
        database._link.execute("PRAGMA user_version = 1")
    with Database(path, read_only=True) as database:
        assert [row.interaction for row in database.iterate()] == [None] * 4
    with Database(path) as database:
        database.write_step(2, groups, advantages=None, metrics={})
        turns = [row.interaction and row.interaction.turns for row in database.iterate()]
    assert turns == [None] * 4 + [2, 1, 3, 1]


def test_an_engine_without_log_probabilities_has_no_foreign_rows():
    rollout = tensorise(collect(), REWARD, SETTINGS)
    assert foreign(rollout).sum(1).tolist() == [3, 0, 6, 0]
    silent = dataclasses.replace(
        rollout,
        engine_logp=torch.full_like(rollout.engine_logp, math.nan),
        mask=torch.zeros_like(rollout.mask),
    )
    assert not bool(foreign(silent).any())
