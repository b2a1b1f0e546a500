"""Golden cases of the rewards: every value agrees with the published formula to 1e-6."""

import pytest
import torch

from gruppo.objective.credit import DrGrpo
from gruppo.reward import (
    CosineLength,
    Format,
    KimiLength,
    LinearLength,
    OpenR1Format,
    Part,
    Repetition,
    RewardSet,
    SoftOverlong,
    TagCount,
)
from gruppo.reward.language import share
from gruppo.types import Completion, Evidence, Problem, Rollout, Score

PROBLEM = Problem(id="p", prompt=())


def row(tokens: tuple[int, ...] = (), text: str = "") -> Completion:
    n = len(tokens)
    return Completion(
        tokens=tokens, logp=(0.0,) * n, mask=(True,) * n, version=(0,) * n, text=text,
        finish="stop",
    )  # fmt: skip


def column(values: list):
    return lambda problem, completions: values


@pytest.mark.parametrize("name", ["reward/soft_overlong", "reward/soft_overlong_small"])
def test_soft_overlong(golden, name: str) -> None:
    given = golden(name)["inputs"]
    overlong = SoftOverlong(max_tokens=given["L_max"], buffer=given["L_cache"])
    values = overlong(PROBLEM, [row((0,) * n) for n in given["lengths"]])
    assert values == pytest.approx(golden(name)["expected"]["r"], abs=1e-9)


def test_cosine(golden) -> None:
    case = golden("reward/cosine")
    reward = CosineLength(max_tokens=case["inputs"]["L_max"])
    completions = [row((0,) * n) for n, _ in case["inputs"]["cases"]]
    scores = [Score(total=float(r), task=float(r)) for _, r in case["inputs"]["cases"]]
    values = reward.shape(PROBLEM, completions, scores)
    assert values == pytest.approx(case["expected"]["r"], abs=1e-9)


@pytest.mark.parametrize("name", ["reward/kimi_length", "reward/kimi_length_equal"])
def test_kimi(golden, name: str) -> None:
    given = golden(name)["inputs"]
    scores = [Score(total=float(c), task=float(c)) for c in given["correct"]]
    values = KimiLength().shape(PROBLEM, [row((0,) * n) for n in given["lengths"]], scores)
    assert values == pytest.approx(golden(name)["expected"]["r"], abs=1e-9)


@pytest.mark.parametrize("name", ["reward/repetition_n2", "reward/repetition_n3"])
def test_repetition(golden, name: str) -> None:
    given = golden(name)["inputs"]
    reward = Repetition(n=given["n"], max_penalty=given["max_penalty"])
    values = reward(PROBLEM, [row(tuple(tokens)) for tokens in given["token_ids"]])
    assert values == pytest.approx(golden(name)["expected"]["r"], abs=1e-9)


def test_format(golden) -> None:
    case = golden("reward/format")
    completions = [row(text=text) for text in case["inputs"]["texts"]]
    assert Format()(PROBLEM, completions) == case["expected"]["strict"]
    assert OpenR1Format()(PROBLEM, completions) == case["expected"]["open_r1_regex"]
    assert TagCount()(PROBLEM, completions) == case["expected"]["tag_count"]


def test_language_consistency(golden) -> None:
    case = golden("reward/language_consistency")
    assert share(case["inputs"]["is_target"]) == pytest.approx(case["expected"]["r"], abs=1e-9)


def test_weighted_sum(golden) -> None:
    case = golden("reward/weighted_sum")
    columns = list(zip(*case["inputs"]["values"], strict=True))
    parts = tuple(
        Part(name=str(k), reward=column(list(values)), weight=weight)
        for k, (values, weight) in enumerate(zip(columns, case["inputs"]["weights"], strict=True))
    )
    scores = RewardSet(parts).score(PROBLEM, [row(), row()])
    assert [s.total for s in scores] == pytest.approx(case["expected"]["total"], abs=1e-9)


def test_r1_total(golden) -> None:
    case = golden("reward/r1_total")
    parts = tuple(Part(name=n, reward=column(values)) for n, values in case["inputs"].items())
    scores = RewardSet(parts, task="accuracy").score(PROBLEM, [row(), row(), row()])
    assert [s.total for s in scores] == pytest.approx(case["expected"]["total"], abs=1e-9)


def test_prime_linear_length(golden) -> None:
    case = golden("reward/prime_linear_length")
    given, expected = case["inputs"], case["expected"]
    length = Part(name="length", reward=LinearLength(), weight=given["weight"], shape=True)
    rewards = RewardSet((Part(name="task", reward=column(given["rewards"])), length))
    scores = rewards.score(PROBLEM, [row((0,) * n) for n in given["output_tokens"]])
    shaped = torch.tensor([s.total for s in scores], dtype=torch.float64)
    assert shaped.tolist() == pytest.approx(expected["shaped"], abs=1e-9)
    task = torch.tensor([s.task for s in scores], dtype=torch.float64)
    one = torch.ones(4, 1)
    rollout = Rollout(
        prompts=((0,),), tokens=one.long(), mask=one.bool(), engine_logp=-one,
        group=torch.zeros(4, dtype=torch.long), total=shaped, task=task, parts=task[:, None],
        part_names=("task",), part_weights=torch.ones(1, dtype=torch.float64),
        length=torch.tensor(given["output_tokens"]), truncated=torch.zeros(4, dtype=torch.bool),
        steps=((),) * 4, baseline=None,
    )  # fmt: skip
    advantage = DrGrpo()(rollout, Evidence())
    assert advantage.tolist() == pytest.approx(expected["advantages"], abs=1e-9)
