"""Health numbers, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from gruppo.data import ProblemStream
from gruppo.diagnose import (
    advantage_metrics,
    answer_metrics,
    data_metrics,
    group_metrics,
    language_metrics,
    length_metrics,
    part_metrics,
    repetition_frac,
    reward_metrics,
    source_metrics,
    staleness_metrics,
    update_metrics,
)
from gruppo.metric import Mean
from gruppo.policy import UpdateReport
from gruppo.reward import LanguageConsistency, Number
from gruppo.reward.base import Part, RewardSet
from gruppo.rollout import RolloutSettings, tensorise
from gruppo.types import Completion, Failure, Group, Message, Problem, Score

REWARD = RewardSet((Part(name="a", reward=lambda problem, rows: [0.0] * len(rows)),))


def row(*tokens, finish="stop", version=0):
    size = len(tokens)
    return Completion(
        tokens=tokens,
        logp=(-1.0,) * size,
        mask=(True,) * size,
        version=(version,) * size,
        text="",
        finish=finish,
    )


def group(values, rows=None, source="", parts=None):
    scores = tuple(
        Score(total=value, task=value, parts={"a": value} if parts is None else parts[n])
        for n, value in enumerate(values)
    )
    drawn = rows or tuple(row(n) for n in range(len(values)))
    problem = Problem(id="x", prompt=(Message("user", "x"),), source=source)
    return Group(problem=problem, prompt_tokens=(1,), completions=drawn, scores=scores)


def laid_out(*groups):
    return tensorise(groups, REWARD, RolloutSettings())


def test_rewards():
    batch = laid_out(group([1.0, 0.0]), group([0.5, None]), group([None, None]))
    assert reward_metrics(batch) == pytest.approx(
        {
            "reward/total_mean": 0.5,
            "reward/task_mean": 0.5,
            "reward/unscored_frac": 0.5,
            "reward/total_std_within": math.sqrt(0.5),
            "reward/total_std_between": 0.0,
        }
    )


def test_nothing_scored_is_nan_and_no_error():
    seen = reward_metrics(laid_out(group([None, None])))
    assert seen.pop("reward/unscored_frac") == 1.0
    assert all(math.isnan(value) for value in seen.values())


def test_parts():
    parts = [{"a": 1.0, "b": None}, {"a": 3.0, "b": 0.5}]
    seen = part_metrics([group([1.0, 0.0], parts=parts)])
    assert seen == pytest.approx(
        {
            "reward/a_mean": 2.0,
            "reward/a_std": math.sqrt(2),
            "reward/a_null_frac": 0.0,
            "reward/b_mean": 0.5,
            "reward/b_std": math.nan,
            "reward/b_null_frac": 0.5,
        },
        nan_ok=True,
    )


def test_a_group_whose_only_right_row_is_unscored_has_no_signal():
    """The task graded the row, but another part of its reward failed: it is not trained on."""
    scores = (Score(total=None, task=1.0), *(Score(total=0.25, task=0.0),) * 3)
    plain = group([0.0] * 4)
    one = Group(
        problem=plain.problem, prompt_tokens=(1,), completions=plain.completions, scores=scores
    )
    assert (one.is_live(), one.is_live("total"), one.pass_rate) == (False, False, 0.25)
    seen = group_metrics([one])
    assert (seen["group/zero_std_frac"], seen["group/pass@1"]) == (1.0, 0.25)


def test_groups():
    failed = Score(total=None, task=None, error=Failure(kind="timeout", fault="grader", text=""))
    lost = Group(
        problem=group([0.0]).problem,
        prompt_tokens=(1,),
        completions=(row(1), row(2)),
        scores=(failed, failed),
    )
    same = (row(5, 6), row(5, 6))
    groups = [group([1.0, 1.0]), group([0.0, 0.0], rows=same), group([1.0, 0.0]), lost]
    assert group_metrics(groups) == pytest.approx(
        {
            "group/zero_std_frac": 3 / 4,
            "group/solve_all_frac": 1 / 3,
            "group/solve_none_frac": 1 / 3,
            "group/unique_frac": 7 / 8,
            "group/pass@1": 0.5,
            "group/pass@G": 2 / 4,
            "group/generated": 4.0,
            "failure/grader_timeout_frac": 2 / 8,
        }
    )


def test_advantages():
    batch = laid_out(
        group([1.0, 0.0], rows=(row(1, 2, 3), row(4))), group([0.0, 0.0], rows=(row(5), row(6, 7)))
    )
    seen = advantage_metrics(batch, torch.tensor([2.0, -1.5, 0.0, 0.0], dtype=torch.float64))
    assert seen == {
        "adv/abs_max": 2.0,
        "adv/group_sum_abs_max": 0.5,
        "tokens/live_frac": pytest.approx(4 / 7, abs=1e-7),
        "tokens/trained": 7.0,
    }


def test_lengths():
    long = row(*[9] * 7, finish="length")
    batch = laid_out(group([1.0, 0.0], rows=(row(1, 2, 3), long)))
    assert length_metrics(batch) == pytest.approx(
        {
            "len/mean": 5.0,
            "len/p95": 3 + 0.95 * 4,
            "len/max": 7.0,
            "len/mean_correct": 3.0,
            "len/mean_wrong": 7.0,
            "len/terminated_mean": 3.0,
            "trunc/frac": 0.5,
            "rep/frac": 0.5,  # seven equal tokens: one 4-gram, four times
        }
    )


def test_repetition():
    assert repetition_frac([[1, 2, 3, 4] * 4, [1, 2, 3, 4] * 3, [1], []]) == 0.25
    assert math.isnan(repetition_frac([]))


def test_staleness_and_sources():
    groups = [
        group([1.0, 0.0], rows=(row(1, version=3), row(2, version=5)), source="a"),
        group([1.0, 1.0], rows=(row(), row(3, version=4)), source="b"),
    ]
    assert staleness_metrics(groups, 5) == {"async/staleness_mean": 1.0, "async/staleness_max": 2.0}
    assert staleness_metrics([group([0.0], rows=(row(),))], 5) == {}
    assert source_metrics(groups) == {"source/a/task_mean": 0.5, "source/b/task_mean": 1.0}
    assert source_metrics(groups[:1]) == {}


def test_updates():
    done = UpdateReport(grad_norm=2.0, lr=0.1, update_ratio=0.01, skipped=False)
    last = UpdateReport(grad_norm=4.0, lr=0.2, update_ratio=0.03, skipped=False)
    lost = UpdateReport(grad_norm=math.nan, lr=0.0, update_ratio=0.0, skipped=True)
    sums = {"is/_weight": Mean(4.0, 4), "is/_weight_squared": Mean(8.0, 4), "x": Mean(1.0, 2)}
    assert update_metrics(sums, [done, lost, last]) == pytest.approx(
        {
            "x": 0.5,
            "is/ess": 0.5,  # weights 1 on average, squares 2: (Σw)² / (n Σw²)
            "is/chi2": 1.0,
            "health/skipped_steps": 1.0,
            "optim/grad_norm": 3.0,
            "optim/update_ratio": 0.02,
            "optim/lr": 0.2,
        }
    )
    assert update_metrics({}, [lost]) == {"health/skipped_steps": 1.0}


def test_data():
    stream = ProblemStream([([Problem(id=c, prompt=()) for c in "abcd"], 1.0)], seed=0, dropped=7)
    stream.draw(6)
    assert data_metrics(stream) == {"data/epoch": 1.5, "data/prompts_dropped": 7.0}


def test_language():
    parts = (*REWARD.parts, Part(name="english", reward=LanguageConsistency(), weight=0.0))
    groups = [
        group([1.0, 0.0], parts=[{"a": 1.0, "english": 0.5}, {"a": 0.0, "english": None}]),
        group([1.0], parts=[{"a": 1.0, "english": 1.0}]),
    ]
    assert language_metrics(groups, parts) == {"lang/consistency": 0.75}
    assert language_metrics(groups, REWARD.parts) == {}
    assert math.isnan(language_metrics([], parts)["lang/consistency"])


def test_different_answers_of_a_group():
    """1/2 and 0.5 are one answer; a completion without one is none."""

    def answered(*texts):
        rows = tuple(replace(row(n), text=text) for n, text in enumerate(texts))
        return group([0.0] * len(texts), rows=rows)

    groups = [answered("so 1/2", "or 0.5", "so 3", "hm"), answered("it is 7", "7", "7", "7")]
    reward = RewardSet((Part(name="a", reward=Number(where="last")),))
    assert answer_metrics(groups, reward) == {"group/unique_answers": (2 + 1) / 2}
    assert answer_metrics(groups, REWARD) == {}  # a function does not say what the answer is
