"""Every preset improves a tiny random model end to end, and does not with the sign flipped."""

import dataclasses
import math

import pytest
import torch

from gruppo.data.stream import ProblemStream
from gruppo.engine.local import LocalEngine
from gruppo.model import Encoder, load
from gruppo.objective import PRESETS, Constant
from gruppo.policy import Optim, Policy
from gruppo.reward.base import Part, RewardSet
from gruppo.rollout import Rollouts, RolloutSettings
from gruppo.train import Run, TrainSettings, train
from gruppo.types import Message, Problem, Score

STEPS = 32
TOKENS = 3


SPECIAL = {
    "passk_analytic": {"extra": 0.0},  # is defined for rewards of 0 and 1
    "passk_best": {"extra": 0.5, "steps": 96},  # only a single best completion is credited
    # a fifth of the tokens is trained: all of them must be ones that decide
    "tokens_80_20": {"steps": 64, "tokens": 1},
}


class Memory:
    """A keeper that remembers each step's mean reward."""

    def __init__(self):
        self.rewards = []

    def step(self, step, groups, advantage, metrics):
        self.rewards.append(metrics["reward/task_mean"])

    def evaluation(self, step, evaluation): ...

    def due(self, step):
        return False

    def save(self, state): ...

    def dump(self, state, targets):
        return ""


def first_is_low(problem, completions):
    """1 if the first token is among the first third of the vocabulary; the step ends there."""
    return [
        Score(total=right, task=right, steps=((1, right), (len(row.tokens), right)))
        for row in completions
        for right in [float(row.tokens[0] < 86)]
    ]


def lowness(problem, completions):
    """Between 0 and 1, hardly ever equal for two completions."""
    return [1 - sum(row.tokens) / (258 * len(row.tokens)) for row in completions]


def run_of(folder, objective, *, steps=STEPS, extra=0.1, tokens=TOKENS):
    torch.manual_seed(0)
    loaded = load(str(folder))
    encoder = Encoder(loaded.tokenizer)
    reward = RewardSet(
        (
            Part(name="first", reward=first_is_low),
            Part(name="low", reward=lowness, weight=extra),
        )
    )
    problems = [Problem(id=c, prompt=(Message("user", c),), answer=c) for c in "abcdefgh"]
    policy = Policy(
        loaded.model,
        optim=Optim(lr=5e-3, warmup_steps=1),
        total_updates=steps,
        reference="copy" if objective.needs_reference else "none",
    )
    engine = LocalEngine(loaded.model, encoder.decode, pad_token=encoder.pad_token)
    rollouts = Rollouts(
        engine=engine,
        encoder=encoder,
        reward=reward,
        stream=ProblemStream([(problems, 1.0)], seed=0),
        settings=RolloutSettings(prompts_per_step=4, group_size=8, max_tokens=tokens),
        seed=0,
        greedy_baseline=objective.needs_greedy,
    )
    return Run(
        policy=policy,
        engine=engine,
        rollouts=rollouts,
        objective=objective,
        settings=TrainSettings(steps=steps),
        keeper=Memory(),
    )


def gain_in_standard_errors(rewards):
    """Mean of the last ten steps above that of the first ten, in standard errors."""
    first, last = torch.tensor(rewards[:10]), torch.tensor(rewards[-10:])
    error = math.sqrt(float(first.var() + last.var()) / 10)
    return float(last.mean() - first.mean()) / max(error, 1e-9)


def filled(objective):
    if isinstance(objective.weights, Constant):
        return dataclasses.replace(objective, weights=Constant(length=TOKENS))
    return objective


# A token's ratio, a sequence's, and a selection; the others run with the slow tests.
QUICK = ("default", "gspo", "kl_cov")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in sorted(PRESETS)
    ],
)
def test_preset_improves_the_model(name, tiny_folder):
    objective = filled(PRESETS[name].objective)
    run = run_of(tiny_folder, objective, **SPECIAL.get(name, {}))
    train(run)
    assert gain_in_standard_errors(run.keeper.rewards) >= 5


@dataclasses.dataclass(frozen=True)
class Flipped:
    """A credit with the wrong sign."""

    credit: object
    needs = frozenset()
    min_group = 2
    centred = True

    def __call__(self, rollout, evidence):
        return -self.credit(rollout, evidence)


@pytest.mark.parametrize(
    "name",
    [
        "default",
        pytest.param("gspo", marks=pytest.mark.slow),
        pytest.param("grpo", marks=pytest.mark.slow),
        pytest.param("cispo", marks=pytest.mark.slow),
    ],
)
def test_the_wrong_sign_does_not_improve_it(name, tiny_folder):
    objective = filled(PRESETS[name].objective)
    run = run_of(tiny_folder, dataclasses.replace(objective, credit=Flipped(objective.credit)))
    train(run)
    assert gain_in_standard_errors(run.keeper.rewards) < 0
    assert sum(run.keeper.rewards[-10:]) / 10 < 0.2
