"""Rollouts: draw problems, sample a group for each, score it, keep what can teach.

``Rollouts.collect`` makes one synchronous rollout batch; ``tensorise`` turns its groups into the
tensors that advantages and losses read. Nothing here knows a loss, and nothing is re-tokenised.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from gruppo.data.stream import ProblemStream
from gruppo.engine.base import SingleTurn, check_sampling
from gruppo.errors import ServiceError
from gruppo.objective import (
    ExcludeBefore,
    KeepTruncated,
    MaskAfter,
    Penalty,
    Truncation,
    ZeroReward,
    refill,
)
from gruppo.record.plain import decode_group, encode_group
from gruppo.reward import RewardSet, score_sound
from gruppo.types import (
    Completion,
    Encode,
    Engine,
    Group,
    Problem,
    Request,
    Rollout,
    Sampler,
    Sampling,
    Score,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """What one rollout batch is made of.

    ``group_size`` completions are drawn for each of ``prompts_per_step`` problems, of at most
    ``max_tokens`` tokens, at ``temperature``; a string of ``stop`` ends one. ``top_p``, ``top_k``
    and ``min_p`` filter the sampler, which needs ``allow_truncated_sampling``: what is drawn is
    then not quite the policy that is trained.

    ``filter`` says what happens to dead groups (all task rewards equal, so no signal): "keep"
    trains on them anyway; "skip" leaves them out of the forward and backward passes but in the
    normalisers, so the gradient is that of "keep"; "drop" takes them out of the batch; "resample"
    draws further problems until ``prompts_per_step`` live groups are there (DAPO, arXiv:2503.14476,
    §3.2), at most ``max_gen_batches`` times, then ``on_limit``. ``filter_metric`` says by which
    reward drop and resample judge. ``oversample`` draws that many times the missing number at once;
    a surplus is kept for the next step. ``truncation`` is what becomes of completions cut by
    ``max_tokens``: "none" trains them as scored, "mask_after" lets them shape the baseline but
    trains none of their tokens, "exclude_before" treats them as unscored, "zero_reward" sets their
    reward to 0, "penalty" replaces it by ``truncation_penalty`` (if negative) or multiplies it by
    it (if not).
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    prompts_per_step: int = 64
    group_size: int = 8
    max_tokens: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    allow_truncated_sampling: bool = False
    filter: Literal["keep", "skip", "drop", "resample"] = "skip"
    filter_metric: Literal["task", "total"] = "task"
    max_gen_batches: int = 10
    oversample: float = 1.0
    on_limit: Literal["use_partial", "error"] = "use_partial"
    truncation: Literal["none", "mask_after", "exclude_before", "zero_reward", "penalty"] = "none"
    truncation_penalty: float = -0.5

    def __post_init__(self) -> None:
        counts = {
            "prompts_per_step": self.prompts_per_step,
            "group_size": self.group_size,
            "max_tokens": self.max_tokens,
            "max_gen_batches": self.max_gen_batches,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} = {count}: must be at least 1")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature = {self.temperature}: training needs samples that differ; use 1.0"
            )
        check_sampling(self.sampling(()), prefix="")
        if not 1 <= self.oversample < math.inf:
            raise ValueError(f"oversample = {self.oversample}: must be at least 1.0 and finite")
        if not math.isfinite(self.truncation_penalty):
            raise ValueError(
                f"truncation_penalty = {self.truncation_penalty}: must be finite, such as -0.5"
            )
        filtered = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        if filtered and not self.allow_truncated_sampling:
            raise ValueError(
                f"top_p = {self.top_p}, top_k = {self.top_k}, min_p = {self.min_p}: a filtered "
                "sampler draws from another distribution than the one that is trained; turn the "
                "filters off or set allow_truncated_sampling = true"
            )

    @property
    def truncated_rows(self) -> Truncation:
        """The rule that ``truncation`` names."""
        rules = (
            KeepTruncated(),
            MaskAfter(),
            ExcludeBefore(),
            ZeroReward(),
            Penalty(value=self.truncation_penalty),
        )
        return {rule.kind: rule for rule in rules}[self.truncation]

    def sampling(self, stop_tokens: tuple[int, ...]) -> Sampling:
        """Return the engine's settings, with the tokenizer's end tokens."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            stop_tokens=stop_tokens,
            stop=self.stop,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The ``groups`` to train on, all ``generated`` for it, and the ``reward`` of this step."""

    groups: tuple[Group, ...]
    generated: tuple[Group, ...]
    gen_batches: int
    reward: RewardSet
    seconds_sampling: float
    seconds_scoring: float

    def stale(self, version: int) -> list[bool]:
        """For every row to train on: was any of it drawn by weights older than ``version``?"""
        rows = [completion for group in self.groups for completion in group.completions]
        return [min(row.version, default=version) < version for row in rows]


@dataclass(slots=True)
class Rollouts:
    """Makes rollout batches, one after another.

    It holds what must survive a restart: the problem stream's position and the ``surplus`` of
    live groups that an earlier step did not need, scored with the weights of that step. ``sampler``
    draws the completions; None stands for the engine alone, whose completions are one turn.
    """

    engine: Engine
    encoder: Encode
    reward: RewardSet
    stream: ProblemStream
    settings: RolloutSettings
    seed: int
    greedy_baseline: bool = False
    surplus: tuple[Group, ...] = ()
    sampler: Sampler | None = None

    def collect(self, step: int = 1) -> Collected:
        """The batch of training step ``step`` (from 1 on). Raises ServiceError at the limit."""
        settings, clock, reward = self.settings, _Clock(), self.reward.at(step)
        generated: list[Group] = []

        def draw(missing: int) -> list[Group]:
            groups = self._generate(math.ceil(missing * settings.oversample), reward, clock)
            generated.extend(groups)
            return groups

        filled = refill(
            draw,
            self._wanted,
            target=settings.prompts_per_step,
            max_batches=settings.max_gen_batches if settings.filter == "resample" else 1,
            carry=self.surplus,
        )
        if len(filled.used) < settings.prompts_per_step and settings.filter == "resample":
            self._at_limit(len(filled.used), filled.batches)
        self.surplus = filled.surplus
        return Collected(
            groups=filled.used,
            generated=tuple(generated),
            gen_batches=filled.batches,
            reward=reward,
            seconds_sampling=clock.sampling,
            seconds_scoring=clock.scoring,
        )

    def state(self) -> dict[str, object]:
        """Return the stream's position and the surplus, ready for JSON."""
        return {
            "stream": self.stream.state(),
            "surplus": [encode_group(group) for group in self.surplus],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.stream.restore(state["stream"])
        self.surplus = tuple(decode_group(group) for group in state["surplus"])

    def _wanted(self, group: Group) -> bool:
        if self.settings.filter in ("keep", "skip"):
            return True
        return group.is_live(self.settings.filter_metric)

    def _at_limit(self, found: int, tries: int) -> None:
        if self.settings.on_limit == "error":
            raise ServiceError(
                f"only {found} of {self.settings.prompts_per_step} groups had differing rewards "
                f"after {tries} batches; use easier or harder problems, a larger group_size, or "
                'on_limit = "use_partial"'
            )

    def _generate(self, count: int, reward: RewardSet, clock: _Clock) -> list[Group]:
        first = self.stream.drawn
        problems = self.stream.draw(count)
        prompts = [self.encoder.encode(problem.prompt) for problem in problems]
        sampling = self.settings.sampling(self.encoder.stop_tokens)
        requests = [
            Request(
                tokens=tokens,
                num_samples=self.settings.group_size,
                key=(self.seed, first + offset),
            )
            for offset, tokens in enumerate(prompts)
        ]
        started = time.perf_counter()
        sampler = self.sampler or SingleTurn(self.engine)
        samples = sampler.draw(problems, requests, sampling)
        greedy = self._greedy(sampler, problems, requests, sampling)
        clock.sampling += time.perf_counter() - started
        started = time.perf_counter()
        # The greedy completion is scored among the sampled ones, so that shaping terms, which
        # depend on the group, are the same function of it as of them.
        drawn = [(*rows, *more) for rows, more in zip(samples, greedy, strict=True)]
        scores = score_sound(reward, list(zip(problems, drawn, strict=True)))
        groups = [
            self._group(problem, tokens, rows, marks)
            for problem, tokens, rows, marks in zip(problems, prompts, drawn, scores, strict=True)
        ]
        clock.scoring += time.perf_counter() - started
        for group in groups:
            if group.pass_rate is not None:
                self.stream.record(group.problem, min(max(group.pass_rate, 0.0), 1.0))
        return groups

    def _greedy(
        self,
        sampler: Sampler,
        problems: Sequence[Problem],
        requests: list[Request],
        sampling: Sampling,
    ) -> list[tuple[Completion, ...]]:
        if not self.greedy_baseline:
            return [()] * len(requests)
        single = [replace(request, num_samples=1) for request in requests]
        return sampler.draw(problems, single, replace(sampling, temperature=0.0))

    def _group(
        self,
        problem: Problem,
        prompt_tokens: tuple[int, ...],
        rows: tuple[Completion, ...],
        scores: tuple[Score, ...],
    ) -> Group:
        """The group of the sampled ``rows``; what the greedy one after them scores is its baseline.

        The baseline is a total as sampled rows have it, the truncation policy applied.
        """
        size = self.settings.group_size
        group, greedy = (
            Group(
                problem=problem,
                prompt_tokens=prompt_tokens,
                completions=rows[part],
                scores=scores[part],
            )
            for part in (slice(size), slice(size, None))
        )
        if not self.greedy_baseline:
            return group
        total = tensorise([greedy], self.reward, self.settings).total.item()
        return replace(group, baseline=None if math.isnan(total) else total)


@dataclass(slots=True)
class _Clock:
    sampling: float = 0.0
    scoring: float = 0.0


def tensorise(
    groups: Sequence[Group],
    reward: RewardSet,
    settings: RolloutSettings,
    *,
    greedy_baseline: bool = False,
) -> Rollout:
    """Lay the groups out as one batch of rows, in group order, padded on the right.

    ``settings.truncation`` is applied: to the mask ("mask_after"), else to the totals.
    """
    rows = [pair for g in groups for pair in zip(g.completions, g.scores, strict=True)]
    width = max((len(completion.tokens) for completion, _ in rows), default=0)
    length = torch.tensor([len(completion.tokens) for completion, _ in rows], dtype=torch.long)
    truncated = torch.tensor([completion.truncated for completion, _ in rows], dtype=torch.bool)
    names = reward.part_names
    baseline = [math.nan if group.baseline is None else group.baseline for group in groups]
    has_baseline = greedy_baseline or any(group.baseline is not None for group in groups)
    rollout = Rollout(
        prompts=tuple(group.prompt_tokens for group in groups),
        tokens=_padded([c.tokens for c, _ in rows], width, 0, torch.long),
        mask=_padded([c.mask for c, _ in rows], width, False, torch.bool),
        engine_logp=_padded([c.logp for c, _ in rows], width, 0.0, torch.float32),
        group=torch.tensor(
            [p for p, group in enumerate(groups) for _ in group.completions], dtype=torch.long
        ),
        total=_floats([score.total for _, score in rows]),
        task=_floats([score.task for _, score in rows]),
        parts=torch.stack(
            [_floats([score.counting(name) for _, score in rows]) for name in names], dim=1
        ),
        part_names=names,
        part_weights=torch.tensor(reward.part_weights, dtype=torch.float64),
        length=length,
        truncated=truncated,
        steps=tuple(score.steps for _, score in rows),
        baseline=torch.tensor(baseline, dtype=torch.float64) if has_baseline else None,
    )
    return settings.truncated_rows(rollout)


def _floats(values: Sequence[float | None]) -> torch.Tensor:
    """Float64 tensor with NaN for None."""
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)


def _padded(
    rows: Sequence[Sequence[float]], width: int, fill: float, dtype: torch.dtype
) -> torch.Tensor:
    batch = torch.full((len(rows), width), fill, dtype=dtype)
    for index, row in enumerate(rows):
        batch[index, : len(row)] = torch.tensor(row, dtype=dtype)
    return batch
