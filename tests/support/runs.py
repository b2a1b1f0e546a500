"""A small run on the tiny model: its keeper keeps all in memory, its engine can be watched."""

import dataclasses

import torch

from gruppo.data.stream import ProblemStream
from gruppo.engine.local import LocalEngine
from gruppo.evaluate import EvalSettings, Evaluator
from gruppo.model import Encoder, load
from gruppo.objective import (
    Grpo,
    KLTerm,
    KLUnbiased,
    Objective,
    PpoClip,
    TokenMean,
)
from gruppo.policy import Optim, Policy
from gruppo.reward.base import Part, RewardSet
from gruppo.rollout import Rollouts, RolloutSettings
from gruppo.settings import TrainSettings
from gruppo.train import Run
from gruppo.types import Message, Problem, Sampling

PLAIN = Objective(credit=Grpo(), surrogate=PpoClip(), weights=TokenMean())
WITH_KL = dataclasses.replace(PLAIN, kl=KLTerm(beta=0.1, estimator=KLUnbiased()))
PROBLEMS = [Problem(id=c, prompt=(Message("user", c),), answer=c) for c in "abcdefgh"]


def weights(policy):
    return {name: tensor.clone() for name, tensor in policy.state()[0].items()}


class Notes:
    """A keeper that keeps everything in memory, and runs a hook whenever it is called."""

    def __init__(self, policy, due=()):
        self.policy, self.dates = policy, due
        self.metrics, self.weights, self.evaluated, self.saved, self.dumped = {}, {}, [], {}, []
        self.on_step = self.on_save = lambda step: None

    def step(self, step, groups, advantage, metrics):
        self.metrics[step] = dict(metrics)
        self.weights[step] = weights(self.policy)
        self.on_step(step)

    def evaluation(self, step, evaluation):
        self.evaluated.append((step, evaluation.metrics["pass@1"]))

    def due(self, step):
        return step in self.dates

    def save(self, state):
        self.on_save(state.step)
        self.saved[state.step] = state, weights(self.policy), self.policy.state()[1]

    def dump(self, state, targets):
        self.dumped.append((state.step, len(targets.rollout.group)))
        return "gruppo resume"


class Watched:
    """The run's engine, which tells a hook of every call (with the first part of its keys)."""

    def __init__(self, engine):
        self.engine, self.hook = engine, lambda key: None

    def generate(self, requests, sampling):
        self.hook(requests[0].key[0])
        return self.engine.generate(requests, sampling)

    def load(self, weights, version):
        self.engine.load(weights, version)

    def close(self):
        self.engine.close()


def lowness(problem, completions):
    return [1 - sum(row.tokens) / (258 * len(row.tokens)) for row in completions]


def run_of(folder, objective=PLAIN, *, reward=lowness, due=(), evaluator=None, **settings):
    torch.manual_seed(0)
    loaded = load(str(folder))
    encoder = Encoder(loaded.tokenizer)
    policy = Policy(
        loaded.model,
        optim=Optim(lr=5e-3, warmup_steps=1),
        total_updates=12,
        reference="copy" if objective.needs_reference else "none",
    )
    engine = Watched(LocalEngine(loaded.model, encoder.decode, pad_token=encoder.pad_token))
    parts = RewardSet((Part(name="low", reward=reward),))
    return Run(
        policy=policy,
        engine=engine,
        rollouts=Rollouts(
            engine=engine,
            encoder=encoder,
            reward=parts,
            stream=ProblemStream([(PROBLEMS, 1.0)], seed=0),
            settings=RolloutSettings(prompts_per_step=2, group_size=5, max_tokens=3),
            seed=0,
        ),
        objective=objective,
        settings=TrainSettings(**{"steps": 4, **settings}),
        keeper=Notes(policy, due),
        evaluator=evaluator(engine, encoder) if evaluator else None,
    )


def scripted(counts, **settings):
    """An evaluator on four problems, of which the n-th evaluation finds counts[n] solved."""
    graded = []

    def reward(problem, completions):
        graded.append(problem)
        solved = counts[(len(graded) - 1) // 4]
        return [float((len(graded) - 1) % 4 < solved)]

    def make(engine, encoder):
        return Evaluator(
            engine=engine,
            encoder=encoder,
            reward=RewardSet((Part(name="right", reward=reward),)),
            problems=tuple(PROBLEMS[:4]),
            settings=EvalSettings(samples=0, **settings),
            sampling=Sampling(max_tokens=2),
        )

    return make
