"""Held-out evaluation: greedy pass@1, sampled pass@k, majority@k, with standard errors.

The same engine and rewards as in training, other problems, and keys of their own, so that an
evaluation never changes what training draws.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from gruppo.data.keyed import hash64
from gruppo.engine.base import SingleTurn, check_sampling
from gruppo.objective import majority, pass_at_k, standard_error
from gruppo.reward import RewardSet, score_sound, used_tools
from gruppo.reward.vote import Ballot, ballot_of
from gruppo.types import Completion, Encode, Engine, Problem, Request, Sampler, Sampling, Score

EVAL_KEY = -1
"""First component of evaluation keys; training's is the run's seed, which is not negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """How to evaluate.

    ``greedy`` gives one deterministic completion a problem. ``samples`` > 0 adds that many drawn
    ones at ``temperature``, filtered by ``top_p``, ``top_k`` (0: off) and ``min_p`` (0: off)
    whatever the rollout's filters are, for pass@k at each ``k`` and majority@samples. A completion
    is right if its task reward is at least ``correct_at``. ``max_tokens = 0`` takes the rollout's.

    ``problems = 0`` takes all held-out problems; another number those whose (source, id) hash
    lowest, which are spread over all sources and kinds, and of which few change when the data
    grow. ``every`` steps during training (0: only before and after), always with the draws of
    ``seed``; ``patience`` evaluations without a better pass@1 stop the run (0: never).
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    every: int = 50
    problems: int = 0
    greedy: bool = True
    samples: int = 8
    k: tuple[int, ...] = (1, 8)
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
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
        check_sampling(self.drawn(Sampling(max_tokens=self.max_tokens)), prefix="")
        if not self.greedy and self.samples < 1:
            raise ValueError("samples = 0 with greedy = false leaves nothing to evaluate")
        if self.samples and (bad := [k for k in self.k if not 1 <= k <= self.samples]):
            raise ValueError(
                f"k = {list(self.k)}: pass@{bad[0]} needs at least {bad[0]} samples a problem, "
                f"samples = {self.samples}"
            )
        if self.samples and self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature}: drawn samples need one above 0")

    def drawn(self, sampling: Sampling) -> Sampling:
        """How to draw samples where the rollout draws by ``sampling``."""
        return replace(
            sampling,
            max_tokens=self.max_tokens or sampling.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
        )

    def chosen(self, problems: tuple[Problem, ...]) -> tuple[Problem, ...]:
        """The problems to evaluate on, in their order."""
        if not self.problems:
            return problems
        lowest = heapq.nsmallest(
            self.problems, range(len(problems)), key=lambda at: _name(problems[at])
        )
        return tuple(problems[at] for at in sorted(lowest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """One problem's completions and scores in an evaluation."""

    problem: Problem
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Metrics named ``pass@1``, ``sampled/pass@8``, …, and the completions behind them.

    If the problems are of several sources, ``source/NAME/pass@1`` (and so on) are those of each.
    """

    metrics: Mapping[str, float]
    greedy: tuple[Graded, ...] = field(default=())
    sampled: tuple[Graded, ...] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Evaluates whatever policy the engine holds on a fixed list of problems.

    ``sampler`` draws the completions; None stands for the engine alone.
    """

    engine: Engine
    encoder: Encode
    reward: RewardSet
    problems: tuple[Problem, ...]
    settings: EvalSettings
    sampling: Sampling
    sampler: Sampler | None = None

    def __call__(self) -> Evaluation:
        """Draw, score and count. Raises ValueError if there is no problem to evaluate on."""
        if not self.problems:
            raise ValueError("no held-out problems: set data.held_out above 0")
        settings = self.settings
        metrics: dict[str, float] = {}
        greedy: tuple[Graded, ...] = ()
        sampled: tuple[Graded, ...] = ()
        drawn = settings.drawn(self.sampling)
        if settings.greedy:
            greedy = self._draw(1, replace(drawn, temperature=0.0))
            metrics |= greedy_metrics(greedy, settings.correct_at)
        if settings.samples:
            sampled = self._draw(settings.samples, drawn)
            metrics |= sampled_metrics(sampled, settings, self.reward)
        metrics |= self._by_source(greedy, sampled)
        return Evaluation(metrics=metrics, greedy=greedy, sampled=sampled)

    def _draw(self, count: int, sampling: Sampling) -> tuple[Graded, ...]:
        problems = self.settings.chosen(self.problems)
        requests = [
            Request(
                tokens=self.encoder.encode(problem.prompt),
                num_samples=count,
                key=(EVAL_KEY, self.settings.seed, _name(problem)),
            )
            for problem in problems
        ]
        sampler = self.sampler or SingleTurn(self.engine)
        drawn = sampler.draw(problems, requests, sampling)
        scores = score_sound(self.reward, list(zip(problems, drawn, strict=True)))
        return tuple(
            Graded(problem=problem, completions=completions, scores=marks)
            for problem, completions, marks in zip(problems, drawn, scores, strict=True)
        )

    def _by_source(
        self, greedy: Sequence[Graded], sampled: Sequence[Graded]
    ) -> Mapping[str, float]:
        """Pass rates of each data source, if there are several."""
        metrics: dict[str, float] = {}
        names = sorted({item.problem.source for item in (*greedy, *sampled)})
        for name in names if len(names) > 1 else ():
            own: dict[str, float] = {}
            if some := [item for item in greedy if item.problem.source == name]:
                own |= accuracy(some, self.settings.correct_at)
            if some := [item for item in sampled if item.problem.source == name]:
                own |= sampled_metrics(some, self.settings, self.reward)
            metrics |= {f"source/{name}/{key}": value for key, value in own.items()}
        return metrics


def _name(problem: Problem) -> int:
    """A number for a problem that no other problem changes."""
    return hash64("eval", problem.source, problem.id)


def is_right(score: Score, correct_at: float) -> bool:
    """Whether the task reward reaches ``correct_at`` (an unscored completion is not right)."""
    return score.task is not None and score.task >= correct_at - 1e-9


def accuracy(graded: Sequence[Graded], correct_at: float) -> dict[str, float]:
    """Share of right greedy completions, and its standard error."""
    right = [is_right(item.scores[0], correct_at) for item in graded]
    share = sum(right) / len(right)
    return {"pass@1": share, "pass@1_stderr": standard_error(share, len(right))}


def greedy_metrics(graded: Sequence[Graded], correct_at: float) -> dict[str, float]:
    """Accuracy of the greedy completions, its standard error, and every reward part's mean."""
    lengths = [len(item.completions[0].own_tokens) for item in graded]
    metrics = {
        **accuracy(graded, correct_at),
        "len": sum(lengths) / len(lengths),
        "trunc_frac": sum(item.completions[0].truncated for item in graded) / len(graded),
        "unscored_frac": sum(item.scores[0].task is None for item in graded) / len(graded),
    }
    for name in graded[0].scores[0].parts:
        values = [item.scores[0].parts.get(name) for item in graded]
        known = [value for value in values if value is not None]
        metrics[f"{name}_mean"] = sum(known) / len(known) if known else math.nan
    return metrics | episode_means([item.completions[0] for item in graded])


def episode_means(completions: Sequence[Completion]) -> dict[str, float]:
    """Turns, and shares with a successful tool call and with an error; {} without episodes."""
    episodes = [row.interaction for row in completions if row.interaction is not None]
    if not episodes:
        return {}
    return {
        "env_error_frac": sum(episode.ended == "error" for episode in episodes) / len(episodes),
        "tool_use": sum(map(used_tools, completions)) / len(episodes),
        "turns": sum(episode.turns for episode in episodes) / len(episodes),
    }


def sampled_metrics(
    graded: Sequence[Graded], settings: EvalSettings, reward: RewardSet
) -> dict[str, float]:
    """Unbiased pass@k (arXiv:2107.03374, eq. 1), avg@n and majority@n over the problems.

    The majority is taken over the problems whose task reward grades an answer that can be read.
    """
    rights = [sum(is_right(s, settings.correct_at) for s in item.scores) for item in graded]
    n = settings.samples
    metrics = {
        f"sampled/pass@{k}": sum(pass_at_k(n, c, k) for c in rights) / len(rights)
        for k in sorted(settings.k)
    }
    metrics[f"sampled/avg@{n}"] = sum(rights) / (n * len(rights))
    votes = [
        _majority_is_right(item, settings.correct_at, read)
        for item in graded
        if (read := ballot_of(item.scores, reward)) is not None
    ]
    if votes:
        metrics[f"sampled/maj@{n}"] = sum(votes) / len(votes)
    return metrics


def in_order(metrics: Mapping[str, float], parts: Sequence[str]) -> dict[str, float]:
    """Return ``metrics`` in the order in which an evaluation gives them.

    Args:
        metrics: An evaluation's, in any order.
        parts: Names of the reward's parts, in their order.

    Example:
        >>> list(in_order({"a_mean": 1, "len": 1, "pass@1": 1, "b_mean": 1}, ["b", "a"]))
        ['pass@1', 'len', 'b_mean', 'a_mean']
    """
    first = ["pass@1", "pass@1_stderr", "len", "trunc_frac", "unscored_frac"]
    rank = {name: at for at, name in enumerate([*first, *(f"{part}_mean" for part in parts)])}

    def place(name: str) -> tuple[str, int, int, int]:
        source, own = "", name
        if name.startswith("source/"):
            split = "/sampled/" if "/sampled/" in name else "/"
            source, _, last = name.rpartition(split)
            own = f"sampled/{last}" if split != "/" else last
        kind, _, count = own.partition("@")
        drawn = ["sampled/pass", "sampled/avg", "sampled/maj"]
        if kind in drawn:
            return source, len(rank) + 1, drawn.index(kind), int(count)
        return source, rank.get(own, len(rank)), 0, 0

    return {name: metrics[name] for name in sorted(metrics, key=lambda name: (place(name), name))}


def _majority_is_right(item: Graded, correct_at: float, read: Ballot) -> bool:
    """Whether the most frequent answer is right.

    An answer is right if a completion that gave it was scored as right, so that the reward's own
    notion of equality decides.
    """
    answers = [read(completion.text) for completion in item.completions]
    voted = majority(answers)
    return voted is not None and any(
        answer == voted and is_right(score, correct_at)
        for answer, score in zip(answers, item.scores, strict=True)
    )
