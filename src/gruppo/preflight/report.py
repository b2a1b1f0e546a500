"""A preflight: a recipe's model, data and reward tried on a few groups, and what that says.

Nothing is written to disk and no run is made. What is measured holds for the model as it is: while
it learns, completions get longer or shorter, and pass rates move.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Final

from gruppo.plan import MemoryPlan, Pass, memory, process_bytes
from gruppo.preflight.advice import Advice, Facts, advise
from gruppo.preflight.machine import available_bytes
from gruppo.preflight.microbatch import largest_micro_batches
from gruppo.preflight.sampling import Sampled, sample
from gruppo.preflight.statistics import Dead, Interval, dead_share, mean_interval, wilson
from gruppo.preflight.timing import Timing, measure_timing, skips_dead
from gruppo.preflight.words import knobs
from gruppo.recipe import Recipe
from gruppo.recipe.build import Parts, resolve
from gruppo.types import Group

GROUPS: Final = 32
"""Groups drawn unless told otherwise: shares are then known to about 15 points."""

_SIZES: Final = (2, 4, 8, 16, 32, 64)
_LEAST: Final = 4  # a mean of fewer completions is hardly a baseline
_BINS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A group size: its dead groups, and the seconds that a group, and a live one, would take."""

    dead: Dead
    seconds: float
    seconds_per_live: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a preflight found. Shares are in [0, 1], times in seconds, sizes in bytes or tokens.

    ``truncation`` and the dead shares of ``sizes`` are what as many groups as the recipe's run
    draws would show, did its model not learn; ``pass_rate`` and ``no_signal`` are means over all
    problems. ``memory`` is of a run whose groups are like those that were drawn, ``memory_full`` of
    one in which every group teaches and no completion ends early.
    """

    groups: int
    completions: int
    pass_rate: Interval | None
    histogram: dict[str, Interval]
    no_signal: Interval
    sizes: tuple[Size, ...]
    worth: int | None
    truncation: Interval
    length: dict[str, float]
    prompt: dict[str, float]
    unscored: float
    reward_seconds: float
    memory: MemoryPlan | None
    memory_full: MemoryPlan | None = None
    memory_unknown: str = ""
    available: int | None
    timing: Timing
    evaluation_seconds: float
    run_seconds: float
    updates_per_rollout: int
    optimizer_steps: int
    knobs: tuple[str, ...]
    advice: tuple[Advice, ...] = field(default=())
    took_seconds: float


def preflight(
    recipe: Recipe,
    *,
    groups: int = GROUPS,
    report: Callable[[str], None] = lambda text: None,
) -> Report:
    """Try ``recipe`` on ``groups`` groups.

    Raises:
        ValueError: the recipe cannot be run here, or ``groups`` is below 1.
        OSError: a download or file failed.
    """
    began = time.perf_counter()
    if groups < 1:
        raise ValueError(f"groups = {groups}: must be at least 1")
    available, process = available_bytes(recipe), process_bytes(recipe)
    parts = resolve(recipe, report)
    try:
        sampled = sample(
            parts.recipe, parts.opened, parts.reward, parts.problems, groups=groups, report=report
        )
        timing = measure_timing(parts.recipe, parts, sampled)
        longest = max(len(group.prompt_tokens) for group in sampled.groups)
        plan = partial(_plan, parts.recipe, longest, process)
        likely = [plan(each) for each in _largest(parts, sampled)]
        full, unknown = plan(None)
        planned = max((p for p, _ in likely if p), key=lambda p: p.peak, default=None)
        found = _report(parts, sampled, timing, planned)
        found = replace(found, memory_full=full, memory_unknown=unknown, available=available)
        facts = _facts(parts, sampled, found)
        return replace(
            found,
            advice=tuple(advise(parts.recipe, facts)),
            took_seconds=time.perf_counter() - began,
        )
    finally:
        parts.close()


def _plan(
    recipe: Recipe, prompt_tokens: int, process: int, largest: Pass | None
) -> tuple[MemoryPlan | None, str]:
    """The memory plan, or why there is none (a model whose code needs real tensors, say).

    ``process`` is what this one took before the model was there.
    """
    try:
        found = memory(recipe, prompt_tokens=prompt_tokens, largest=largest)
    except (ValueError, OSError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        return None, str(error)[:200]
    return replace(found, process=process), ""


def _largest(parts: Parts, sampled: Sampled) -> list[Pass]:
    """The largest micro-batches of a run whose groups are like those that were drawn."""
    rollout, train = parts.recipe.rollout, parts.recipe.train
    return largest_micro_batches(
        sampled.groups,
        size=-(-rollout.prompts_per_step // train.minibatches),
        budget=train.tokens_per_microbatch,
        steps=train.num_updates,
        packed=parts.policy.packed,
        skips=skips_dead(parts.recipe, parts.objective),
        resamples=rollout.filter == "resample",
    )


def _report(parts: Parts, sampled: Sampled, timing: Timing, planned: MemoryPlan | None) -> Report:
    recipe, groups = parts.recipe, sampled.groups
    rates = [min(max(r, 0.0), 1.0) for g in groups if (r := g.pass_rate) is not None]
    rows = [completion for group in groups for completion in group.completions]
    lengths = sorted(len(row.tokens) for row in rows)
    prompts = sorted(len(group.prompt_tokens) for group in groups)
    cut = [statistics.fmean(row.truncated for row in group.completions) for group in groups]
    sizes = _sizes(parts, groups, timing)
    evaluation = _evaluation(recipe, parts, timing, statistics.fmean(lengths))
    scores = [score for group in groups for score in group.scores]
    return Report(
        groups=len(groups),
        completions=len(rows),
        pass_rate=mean_interval(rates) if rates else None,
        histogram=histogram(rates),
        no_signal=mean_interval([float(not group.is_live("total")) for group in groups]),
        sizes=sizes,
        worth=worth(sizes),
        truncation=mean_interval(cut, future=_groups_of_run(recipe)),
        length=spread(lengths),
        prompt=spread(prompts),
        unscored=statistics.fmean(score.total is None for score in scores),
        reward_seconds=sum(batch.seconds_scoring for batch in sampled.batches) / len(rows),
        memory=planned,
        available=None,
        timing=timing,
        evaluation_seconds=evaluation,
        run_seconds=recipe.train.steps * timing.step + evaluation,
        updates_per_rollout=recipe.train.inner_epochs * recipe.train.minibatches,
        optimizer_steps=recipe.train.num_updates,
        knobs=tuple(knobs(recipe)),
        took_seconds=0.0,
    )


def _groups_of_run(recipe: Recipe) -> int:
    return recipe.train.steps * recipe.rollout.prompts_per_step


def histogram(rates: Sequence[float]) -> dict[str, Interval]:
    """Share of problems by pass rate, Wilson's interval each: none, quarters between, all.

    >>> [name for name, share in histogram([0.0, 0.0, 0.5, 1.0]).items() if share.value]
    ['0', '25 to 50 %', '100 %']
    """
    inside = [rate for rate in rates if 1e-9 < rate < 1 - 1e-9]
    counts = {"0": sum(rate <= 1e-9 for rate in rates)}
    for low, high in pairwise(_BINS):
        name = f"{100 * low:.0f} to {100 * high:.0f} %"
        counts[name] = sum(low < rate <= high for rate in inside)
    counts["100 %"] = sum(rate >= 1 - 1e-9 for rate in rates)
    return {name: wilson(count, len(rates)) for name, count in counts.items()} if rates else {}


def spread(values: Sequence[int]) -> dict[str, float]:
    """Mean and some quantiles of sorted values.

    >>> spread([1, 2, 3, 4])
    {'mean': 2.5, 'p50': 2, 'p95': 4, 'max': 4}
    """
    last = len(values) - 1
    quantiles = {"p50": values[last // 2], "p95": values[min(last, round(0.95 * last))]}
    return {"mean": statistics.fmean(values), **quantiles, "max": values[-1]}


def scored_rewards(groups: Sequence[Group]) -> list[list[float]]:
    """Task rewards of each group's rows that would be trained on."""
    return [
        [s.task for s in group.scores if s.total is not None and s.task is not None]
        for group in groups
    ]


def _sizes(parts: Parts, groups: Sequence[Group], timing: Timing) -> tuple[Size, ...]:
    rows = scored_rewards(groups)
    own = parts.recipe.rollout.group_size
    prompt = statistics.fmean(len(group.prompt_tokens) for group in groups)
    length = statistics.fmean(len(c.tokens) for g in groups for c in g.completions)
    sizes = []
    for size in sorted({*_SIZES, own} - {1}):
        dead = dead_share(rows, size, future=_groups_of_run(parts.recipe))
        if dead is None:
            continue
        cost = group_seconds(
            size,
            prompt=prompt,
            length=length,
            live=1 - dead.share.value,
            timing=timing,
            packed=parts.policy.packed,
            skips=parts.recipe.rollout.filter != "keep",
        )
        live = max(1 - dead.share.value, 1e-6)
        sizes.append(Size(dead=dead, seconds=cost, seconds_per_live=cost / live))
    return tuple(sizes)


def group_seconds(
    size: int,
    *,
    prompt: float,
    length: float,
    live: float,
    timing: Timing,
    packed: bool,
    skips: bool,
) -> float:
    """Seconds for a group of ``size``: the prompt counts once where it is shared.

    A prompt token is read in one pass, a third of what a trained one takes (forward and twice as
    much backward). Dead groups that are left out cost no training.
    """
    copies = 1 if packed else size
    drawn = prompt * copies * timing.per_trained_token / 3 + size * length * timing.per_drawn_token
    trained = (prompt * copies + size * length) * timing.per_trained_token
    return drawn + trained * (live if skips else 1.0)


def worth(sizes: Sequence[Size]) -> int | None:
    """The group size of at least 4 with the cheapest live group; None if all groups are dead."""
    fit = [s for s in sizes if s.dead.group >= _LEAST and s.dead.share.value < 1 - 1e-6]
    return min(fit, key=lambda s: s.seconds_per_live).dead.group if fit else None


def _evaluation(recipe: Recipe, parts: Parts, timing: Timing, length: float) -> float:
    """Seconds of all evaluations of a run, by the tokens that they draw."""
    if parts.evaluator is None:
        return 0.0
    settings, held = recipe.eval, len(parts.problems.held_out)
    problems = min(settings.problems, held) if settings.problems else held
    rows = problems * (settings.greedy + settings.samples)
    times = 2 + ((recipe.train.steps - 1) // settings.every if settings.every else 0)
    return times * rows * length * timing.per_drawn_token


def _facts(parts: Parts, sampled: Sampled, found: Report) -> Facts:
    rows = scored_rewards(sampled.groups)
    own = dead_share(
        rows, max(parts.recipe.rollout.group_size, 2), future=_groups_of_run(parts.recipe)
    )
    by_size: Mapping[int, float] = {s.dead.group: s.seconds_per_live for s in found.sizes}
    tokens = [c.tokens for g in sampled.groups for c in g.completions]
    unique = sum(len({c.tokens for c in g.completions}) for g in sampled.groups)
    return Facts(
        pass_rate=found.pass_rate,
        dead=own.share if own is not None else None,
        worth=found.worth,
        seconds_per_live=dict(by_size),
        truncation=found.truncation,
        longest=int(found.length["max"]),
        unscored=found.unscored,
        unique=unique / len(tokens),
        scoring_share=found.timing.scoring / max(found.timing.step, 1e-9),
        run_seconds=found.run_seconds,
        likely=found.memory.peak if found.memory is not None else None,
        peak=found.memory_full.peak if found.memory_full is not None else None,
        available=found.available,
        problems=sum(len(problems) for problems, _ in parts.problems.train),
        draws=found.timing.batches,
        total_varies=found.no_signal.value < 1,
    )
