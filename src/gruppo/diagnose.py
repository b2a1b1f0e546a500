"""Health numbers of a step, from its groups, its tensors and its optimizer steps.

Losses return per-token values and no metrics; every number that is logged is made here or in
``update.token_metrics``. Judging the numbers (what is too high, and what to do) is not done here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gruppo.data import ProblemStream
from gruppo.metric import Metric, reduce
from gruppo.objective.masks import foreign
from gruppo.policy import UpdateReport
from gruppo.reward import LanguageConsistency, Part, RewardSet, used_tools
from gruppo.reward.vote import ballot_of
from gruppo.types import Group, Rollout


def step_metrics(
    groups: Sequence[Group],
    generated: Sequence[Group],
    rollout: Rollout,
    advantage: Tensor,
    *,
    update: Mapping[str, Metric],
    reports: Sequence[UpdateReport],
    version: int,
) -> dict[str, float]:
    """Every metric of one step whose inputs exist, by its logged name.

    ``groups`` are trained on, ``generated`` were drawn for it (filters make them differ),
    ``update`` are the per-token sums of the optimizer steps, ``version`` the policy's before them.
    """
    return {
        **reward_metrics(rollout),
        **part_metrics(groups),
        **group_metrics(generated or groups),
        **advantage_metrics(rollout, advantage),
        **length_metrics(rollout),
        **staleness_metrics(groups, version),
        **episode_metrics(groups),
        **source_metrics(groups),
        **update_metrics(update, reports),
    }


def reward_metrics(rollout: Rollout) -> dict[str, float]:
    """Means and spreads of the total; the share that could not be scored."""
    total = rollout.total
    scored = ~total.isnan()
    metrics = {
        "reward/total_mean": _mean(total[scored]),
        "reward/task_mean": _mean(rollout.task[~rollout.task.isnan()]),
        "reward/unscored_frac": _mean((~scored).double()),
    }
    within, between = _spread(total, rollout.group, len(rollout.prompts))
    metrics["reward/total_std_within"] = within
    metrics["reward/total_std_between"] = between
    return metrics


def part_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Mean, spread and share of missing values of every reward part, shaping terms included."""
    columns: dict[str, list[float | None]] = {}
    for group in groups:
        for score in group.scores:
            for name, value in score.parts.items():
                columns.setdefault(name, []).append(value)
    metrics: dict[str, float] = {}
    for name, column in columns.items():
        known = torch.tensor([v for v in column if v is not None], dtype=torch.float64)
        metrics[f"reward/{name}_mean"] = _mean(known)
        metrics[f"reward/{name}_std"] = float(known.std()) if len(known) > 1 else math.nan
        metrics[f"reward/{name}_null_frac"] = 1 - len(known) / len(column)
    return metrics


def _spread(total: Tensor, group: Tensor, num_groups: int) -> tuple[float, float]:
    """Mean within-group standard deviation, and the standard deviation of the group means."""
    rows = [total[(group == g) & ~total.isnan()] for g in range(num_groups)]
    within = [float(row.std()) for row in rows if len(row) > 1]
    means = torch.stack([row.mean() for row in rows if len(row)]) if any(map(len, rows)) else None
    between = float(means.std()) if means is not None and len(means) > 1 else math.nan
    return (sum(within) / len(within) if within else math.nan), between


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Shares of groups without signal, solved by all, solved by none; kinds of failures."""
    rates = [rate for group in groups if (rate := group.pass_rate) is not None]
    best = [max((s.task for s in g.scores if s.task is not None), default=0.0) for g in groups]
    failures = Counter(
        f"{score.error.fault}_{score.error.kind}"
        for group in groups
        for score in group.scores
        if score.error
    )
    rows = sum(len(group.completions) for group in groups)
    return {
        "group/zero_std_frac": _share(not group.is_live() for group in groups),
        "group/solve_all_frac": _share(rate >= 1 - 1e-9 for rate in rates),
        "group/solve_none_frac": _share(rate <= 1e-9 for rate in rates),
        "group/unique_frac": _share(
            first
            for group in groups
            for first in _first_seen([completion.tokens for completion in group.completions])
        ),
        "group/pass@1": sum(rates) / len(rates) if rates else math.nan,
        "group/pass@G": sum(best) / len(best) if best else math.nan,
        "group/generated": float(len(groups)),
        **{f"failure/{name}_frac": count / rows for name, count in failures.items()},
    }


def advantage_metrics(rollout: Rollout, advantage: Tensor) -> dict[str, float]:
    """Largest advantage, and largest |sum| of a group: 0 for centred estimators."""
    rows = advantage if advantage.dim() == 1 else advantage.sum(dim=1)
    sums = torch.zeros(len(rollout.prompts), dtype=rows.dtype)
    sums.index_add_(0, rollout.group, rows)
    trained = rollout.mask.sum()
    signal = (rows != 0)[:, None] & rollout.mask
    return {
        "adv/abs_max": _largest(advantage.abs()),
        "adv/group_sum_abs_max": _largest(sums.abs()),
        "tokens/live_frac": float(signal.sum() / trained) if trained else math.nan,
        "tokens/trained": float(trained),
    }


def length_metrics(rollout: Rollout) -> dict[str, float]:
    """Lengths in the policy's own tokens: all, right, wrong, those that ended by themselves."""
    others = foreign(rollout).cpu()
    inside = torch.arange(others.shape[1]) < rollout.length.cpu()[:, None]
    length = rollout.length.double() - (others & inside).sum(1).to(rollout.length.device)
    task = rollout.task
    return {
        "len/mean": _mean(length),
        "len/p95": float(length.quantile(0.95)) if len(length) else math.nan,
        "len/max": _largest(length),
        "len/mean_correct": _mean(length[task >= 1 - 1e-9]),
        "len/mean_wrong": _mean(length[task < 1 - 1e-9]),
        "len/terminated_mean": _mean(length[~rollout.truncated]),
        "trunc/frac": _mean(rollout.truncated.double()),
        "rep/frac": repetition_frac(
            [
                row[:n][~other[:n]].tolist()
                for row, n, other in zip(rollout.tokens, rollout.length, others, strict=True)
            ]
        ),
    }


def staleness_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Updates between the oldest token of each completion and the weights that train on it."""
    ages = [version - min(c.version) for g in groups for c in g.completions if c.version]
    if not ages:
        return {}
    return {
        "async/staleness_mean": sum(ages) / len(ages),
        "async/staleness_max": float(max(ages)),
    }


def episode_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What happened in the episodes with an environment; {} if there were none."""
    rows = [row for group in groups for row in group.completions]
    episodes = [row.interaction for row in rows if row.interaction is not None]
    if not episodes:
        return {}
    calls = sum(episode.calls for episode in episodes)
    tokens, own = sum(len(row.tokens) for row in rows), sum(len(row.own_tokens) for row in rows)
    return {
        "env/turns": sum(episode.turns for episode in episodes) / len(episodes),
        "env/calls": calls / len(episodes),
        "env/failed_call_frac": (
            sum(episode.failed_calls for episode in episodes) / calls if calls else math.nan
        ),
        "env/tool_use_frac": _share(used_tools(row) for row in rows),
        "env/limit_frac": _share(episode.ended in ("turns", "tokens") for episode in episodes),
        "env/error_frac": _share(episode.ended == "error" for episode in episodes),
        "env/token_frac": 1 - own / tokens if tokens else math.nan,
    }


def source_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Task reward of each data source, if there are several."""
    by_source: dict[str, list[float]] = {}
    for group in groups:
        if (rate := group.pass_rate) is not None:
            by_source.setdefault(group.problem.source, []).append(rate)
    if len(by_source) < 2:
        return {}
    return {f"source/{name}/task_mean": sum(v) / len(v) for name, v in by_source.items()}


def data_metrics(stream: ProblemStream) -> dict[str, float]:
    """Passes over the most repeated data set, and problems left out for too long a prompt."""
    return {
        "data/epoch": stream.epoch,
        "data/prompts_dropped": float(stream.prompts_dropped),
    }


def language_metrics(groups: Sequence[Group], parts: Sequence[Part]) -> dict[str, float]:
    """Mean share of words in the target language, where a part of the reward measures it."""
    names = {part.name for part in parts if isinstance(part.reward, LanguageConsistency)}
    values = [
        value
        for group in groups
        for score in group.scores
        for name in names
        if (value := score.parts.get(name)) is not None
    ]
    if not names:
        return {}
    return {"lang/consistency": sum(values) / len(values) if values else math.nan}


def answer_metrics(groups: Sequence[Group], reward: RewardSet) -> dict[str, float]:
    """Mean number of different final answers in a group, where the task reward reads answers.

    Answers count as equal as they do in a vote; a completion without one counts for nothing.
    """
    counts = [
        len({read(row.text) for row in group.completions} - {None})
        for group in groups
        if (read := ballot_of(group.scores, reward)) is not None
    ]
    return {"group/unique_answers": sum(counts) / len(counts)} if counts else {}


def composition_metrics(
    groups: Sequence[Group], parts: Sequence[Part], *, step: int
) -> dict[str, float]:
    """What ranges, gates and ramps of the reward do: mean of what counts, share changed, weight.

    Parts without any have no entry: their raw mean and constant weight say all.
    """
    scores = [score for group in groups for score in group.scores]
    metrics: dict[str, float] = {}
    for part in parts:
        name = part.name
        if part.clip is not None or part.gate is not None:
            values = [score.counting(name) for score in scores]
            known = [value for value in values if value is not None]
            metrics[f"reward/{name}_counted_mean"] = sum(known) / len(known) if known else math.nan
            metrics[f"reward/{name}_changed_frac"] = _share(name in s.counted for s in scores)
        if part.ramp is not None:
            metrics[f"reward/{name}_weight"] = part.weight_at(step)
    return metrics


def update_metrics(
    update: Mapping[str, Metric], reports: Sequence[UpdateReport]
) -> dict[str, float]:
    """Per-token means of the optimizer steps, and what the optimizer did."""
    metrics = reduce(update)
    weight, square = metrics.pop("is/_weight", None), metrics.pop("is/_weight_squared", None)
    if weight is not None and square is not None:
        # effective sample size (Σw)² / (n Σw²), and χ² = E[w²] - 1, of the engine-to-trainer ratio
        metrics["is/ess"] = weight**2 / square if square else math.nan
        metrics["is/chi2"] = square - 1
    steps = [report for report in reports if not report.skipped]
    metrics["health/skipped_steps"] = float(len(reports) - len(steps))
    if steps:
        metrics["optim/grad_norm"] = sum(report.grad_norm for report in steps) / len(steps)
        metrics["optim/update_ratio"] = sum(report.update_ratio for report in steps) / len(steps)
        metrics["optim/lr"] = steps[-1].lr
    return metrics


def repetition_frac(rows: Sequence[Sequence[int]], n: int = 4, repeats: int = 4) -> float:
    """Share of completions in which some n-gram of tokens occurs at least ``repeats`` times."""
    return _share(
        max(Counter(zip(*(row[i:] for i in range(n)), strict=False)).values(), default=0) >= repeats
        for row in rows
    )


def _first_seen(rows: Sequence[Sequence[int]]) -> list[bool]:
    """For each row, whether no earlier one equals it."""
    seen: set[tuple[int, ...]] = set()
    flags = []
    for row in map(tuple, rows):
        flags.append(row not in seen)
        seen.add(row)
    return flags


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else math.nan


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else math.nan
