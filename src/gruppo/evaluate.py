"""Held-out evaluation: greedy pass@1, sampled pass@k, majority@k, with standard errors.

The same engine and rewards as in training, other problems, and keys of their own, so that an
evaluation never changes what training draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from gruppo.engine.base import check_sampling
from gruppo.objective import majority, pass_at_k, standard_error
from gruppo.reward.base import RewardSet
from gruppo.types import Completion, Encode, Engine, Problem, Request, Sampling, Score

EVAL_KEY = -1
"""First component of evaluation keys; training's is the run's seed, which is not negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """How to evaluate.

    ``greedy`` gives one deterministic completion a problem. ``samples`` > 0 adds that many drawn
    ones at ``temperature`` / ``top_p``, for pass@k at each ``k`` and majority@samples. A completion
    is right if its task reward is at least ``correct_at``. ``max_tokens = 0`` takes the rollout's.
    ``problems = 0`` takes all held-out problems. ``every`` steps during training (0: only before
    and after), always with the draws of ``seed``; ``patience`` evaluations without a better pass@1
    stop the run (0: never).
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    every: int = 50
    problems: int = 0
    greedy: bool = True
    samples: int = 8
    k: tuple[int, ...] = (1, 8)
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 0
    correct_at: float = 1.0
    seed: int = 0
    patience: int = 0

    def __post_init__(self) -> None:
        for name, count in (
            ("every", self.every),
            ("problems", self.problems),
            ("samples", self.samples),
            ("patience", self.patience),
            ("seed", self.seed),
        ):
            if count < 0:
                raise ValueError(f"{name} = {count}: must not be negative")
        check_sampling(
            Sampling(max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p),
            prefix="",
        )
        if not self.greedy and self.samples < 1:
            raise ValueError("samples = 0 with greedy = false leaves nothing to evaluate")
        if self.samples and (bad := [k for k in self.k if not 1 <= k <= self.samples]):
            raise ValueError(
                f"k = {list(self.k)}: pass@{bad[0]} needs at least {bad[0]} samples a problem, "
                f"samples = {self.samples}"
            )
        if self.samples and self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature}: drawn samples need one above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """One problem's completions and scores in an evaluation."""

    problem: Problem
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Metrics named ``pass@1``, ``pass@1_stderr``, …, and the completions behind them."""

    metrics: Mapping[str, float]
    greedy: tuple[Graded, ...] = field(default=())
    sampled: tuple[Graded, ...] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Evaluates whatever policy the engine holds on a fixed list of problems."""

    engine: Engine
    encoder: Encode
    reward: RewardSet
    problems: tuple[Problem, ...]
    settings: EvalSettings
    sampling: Sampling
    extract: Callable[[str], str | None] | None = None
    """Final answer of a completion's text, for the majority vote; None: no vote is taken."""

    def __call__(self) -> Evaluation:
        """Draw, score and count. Raises ValueError if there is no problem to evaluate on."""
        if not self.problems:
            raise ValueError("no held-out problems: set data.held_out above 0")
        settings = self.settings
        metrics: dict[str, float] = {}
        greedy: tuple[Graded, ...] = ()
        sampled: tuple[Graded, ...] = ()
        if settings.greedy:
            greedy = self._draw(1, replace(self.sampling, temperature=0.0))
            metrics |= greedy_metrics(greedy, settings.correct_at)
        if settings.samples:
            drawn = replace(self.sampling, temperature=settings.temperature, top_p=settings.top_p)
            sampled = self._draw(settings.samples, drawn)
            metrics |= sampled_metrics(sampled, settings, self.extract)
        return Evaluation(metrics=metrics, greedy=greedy, sampled=sampled)

    def _draw(self, count: int, sampling: Sampling) -> tuple[Graded, ...]:
        if self.settings.max_tokens:
            sampling = replace(sampling, max_tokens=self.settings.max_tokens)
        number = self.settings.problems or len(self.problems)
        problems = self.problems[:number]
        requests = [
            Request(
                tokens=self.encoder.encode(problem.prompt),
                num_samples=count,
                key=(EVAL_KEY, self.settings.seed, index),
            )
            for index, problem in enumerate(problems)
        ]
        drawn = self.engine.generate(requests, sampling)
        scores = self.reward.score_groups(list(zip(problems, drawn, strict=True)))
        return tuple(
            Graded(problem=problem, completions=completions, scores=marks)
            for problem, completions, marks in zip(problems, drawn, scores, strict=True)
        )


def is_right(score: Score, correct_at: float) -> bool:
    """Whether the task reward reaches ``correct_at`` (an unscored completion is not right)."""
    return score.task is not None and score.task >= correct_at - 1e-9


def greedy_metrics(graded: Sequence[Graded], correct_at: float) -> dict[str, float]:
    """Accuracy of the greedy completions, its standard error, and every reward part's mean."""
    right = [is_right(item.scores[0], correct_at) for item in graded]
    accuracy = sum(right) / len(right)
    lengths = [len(item.completions[0].tokens) for item in graded]
    metrics = {
        "pass@1": accuracy,
        "pass@1_stderr": standard_error(accuracy, len(right)),
        "len": sum(lengths) / len(lengths),
        "trunc_frac": sum(item.completions[0].truncated for item in graded) / len(graded),
        "unscored_frac": sum(item.scores[0].task is None for item in graded) / len(graded),
    }
    for name in graded[0].scores[0].parts:
        values = [item.scores[0].parts.get(name) for item in graded]
        known = [value for value in values if value is not None]
        metrics[f"{name}_mean"] = sum(known) / len(known) if known else math.nan
    return metrics


def sampled_metrics(
    graded: Sequence[Graded],
    settings: EvalSettings,
    extract: Callable[[str], str | None] | None,
) -> dict[str, float]:
    """Unbiased pass@k (arXiv:2107.03374, eq. 1), avg@n and majority@n over the problems."""
    rights = [sum(is_right(s, settings.correct_at) for s in item.scores) for item in graded]
    n = settings.samples
    metrics = {
        f"sampled/pass@{k}": sum(pass_at_k(n, c, k) for c in rights) / len(rights)
        for k in settings.k
    }
    metrics[f"sampled/avg@{n}"] = sum(rights) / (n * len(rights))
    if extract is not None:
        votes = [_majority_is_right(item, settings.correct_at, extract) for item in graded]
        metrics[f"sampled/maj@{n}"] = sum(votes) / len(votes)
    return metrics


def _majority_is_right(
    item: Graded, correct_at: float, extract: Callable[[str], str | None]
) -> bool:
    """Whether the most frequent extracted answer is right.

    An answer is right if a completion that gave it was scored as right, so that the reward's own
    notion of equality decides.
    """
    answers = [extract(completion.text) for completion in item.completions]
    voted = majority(answers)
    return voted is not None and any(
        answer == voted and is_right(score, correct_at)
        for answer, score in zip(answers, item.scores, strict=True)
    )
