"""``gruppo reward test``: attack the recipe's reward, print a table and findings."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from gruppo.cli.written import printable, say, show_findings, show_table, write_json
from gruppo.data.keyed import hash64
from gruppo.lab import (
    Examination,
    Finding,
    Lengths,
    correlate,
    examine,
    judge,
    judge_lengths,
    made_lengths,
    share,
    table,
)
from gruppo.recipe import Recipe
from gruppo.recipe.answers import describe_check
from gruppo.recipe.build import open_model, open_rewards
from gruppo.recipe.problems import Splits, open_problems, prompt_limit
from gruppo.reward import RewardSet
from gruppo.types import Problem

_FOUND: Final = 1
_ANY_LENGTH: Final = 1 << 30
_SHOWN: Final = 48


def run(
    recipe: Recipe,
    *,
    threshold: float,
    problems: int,
    samples: int,
    output: Path | None,
    console: Console,
    report: Callable[[str], None],
) -> int:
    """Test the reward of ``recipe``; 1 if there is a finding of severity "error".

    Raises:
        ValueError: a number out of range, or a recipe that cannot be opened.
    """
    if problems < 1 or samples < 0:
        raise ValueError(
            f"problems = {problems}, samples = {samples}: there must be at least 1 problem, and "
            "0 or more samples"
        )
    if not 0 < threshold < 1:
        raise ValueError(f"threshold = {threshold}: must lie between 0 and 1, such as 0.5")
    reward = open_rewards(recipe, report)
    try:
        splits = open_problems(
            recipe.data,
            lambda messages: (),
            report,
            max_prompt_tokens=_ANY_LENGTH,
            environment=recipe.environment.open(report),
        )
        template = recipe.reward.own_answer()
        if template is None:
            report(describe_check(recipe.reward))
        seen = examine(
            reward,
            choose(splits, problems),
            template=template,
            max_tokens=recipe.rollout.max_tokens,
        )
        found = judge(seen, threshold=threshold)
        lengths = made_lengths(seen)
        if samples:
            lengths = _sampled(recipe, reward, samples, report)
        found += judge_lengths(lengths)
    finally:
        reward.close()
    _show(seen, found, lengths, threshold, console)
    if output is not None:
        write_json(output, as_table(seen, found, lengths, threshold))
        say(console, f"written: {output}")
    return _FOUND if any(finding.severity == "error" for finding in found) else 0


def choose(splits: Splits, count: int) -> list[Problem]:
    """Some problems of every source in turn, those whose hash is lowest."""
    drawn: list[list[Problem]] = []
    for source, (problems, _) in enumerate(splits.train):
        rows = range(len(problems))
        lowest = heapq.nsmallest(count, rows, key=lambda row, s=source: hash64("lab", s, row))
        drawn.append([problems[row] for row in lowest])
    turns = [part[n] for n in range(count) for part in drawn if n < len(part)]
    return turns[:count]


def _sampled(
    recipe: Recipe, reward: RewardSet, count: int, report: Callable[[str], None]
) -> Lengths:
    """Completions of the recipe's model, and whether their scores follow their length."""
    from gruppo.model.parts import context_length
    from gruppo.preflight import sample

    opened = open_model(recipe.model, recipe, report)
    try:
        splits = open_problems(
            recipe.data,
            opened.encoder.encode,
            report,
            max_prompt_tokens=prompt_limit(recipe, context_length(opened.model)),
            environment=opened.environment,
        )
        groups = max(1, -(-count // recipe.rollout.group_size))
        drawn = sample(recipe, opened, reward, splits, groups=groups, report=report).groups
    finally:
        opened.engine.close()
    pairs = [
        (float(len(completion.own_tokens)), score.total)
        for group in drawn
        for completion, score in zip(group.completions, group.scores, strict=True)
        if score.total is not None
    ]
    return correlate("samples of the model", pairs)


def _show(
    seen: Examination,
    found: list[Finding],
    lengths: Lengths,
    threshold: float,
    console: Console,
) -> None:
    known = "" if seen.layout_is_known else " (the usual one that scores best)"
    say(console, f"right answers are written as {printable(repr(seen.layout.template))}{known}")
    golden = [score.task for score in seen.alone]
    told = ", ".join("unscored" if g is None else f"{g:g}" for g in dict.fromkeys(golden))
    say(console, f"{len(golden)} of them score {told}\n")
    head = ("attack", "best variant", "task", "total", "unscored", "text")
    rows = [
        (
            r.attack,
            r.variant,
            _percent(r.share),
            _percent(r.total_share),
            str(r.unscored),
            _cut(r.text),
        )
        for r in table(seen)
    ]
    show_table(console, head, rows)
    say(console, f"\nshares of the right answer's score; above {threshold:.0%} is an exploit")
    say(console, _about_lengths(lengths))
    name, slowest = seen.slowest
    say(
        console,
        f"{1000 * seen.seconds_per_row:.2f} ms a completion; slowest {1000 * slowest:.1f} ms "
        f"({name})\n",
    )
    show_findings(console, found)
    counts = {s: sum(f.severity == s for f in found) for s in ("error", "warning", "note")}
    say(console, ", ".join(f"{number} {name}s" for name, number in counts.items()))


def as_table(
    seen: Examination, found: list[Finding], lengths: Lengths, threshold: float
) -> dict[str, Any]:
    """Everything as plain data."""
    return {
        "threshold": threshold,
        "layout": seen.layout.template,
        "layout_is_known": seen.layout_is_known,
        "problems": [problem.id for problem in seen.problems],
        "golden": [score.task for score in seen.alone],
        "attacks": [asdict(row) for row in table(seen)],
        "trials": [
            {
                "attack": trial.attack,
                "variant": trial.variant,
                "kind": trial.kind,
                "share": share(seen, trial),
                "text": trial.text,
                "task": [None if score is None else score.task for score in trial.scores],
                "total": [None if score is None else score.total for score in trial.scores],
                "error": [
                    None if score is None or score.error is None else score.error.kind
                    for score in trial.scores
                ],
            }
            for trial in seen.trials
        ],
        "unequal": [asdict(unequal) for unequal in seen.unequal],
        "hung": list(seen.hung),
        "skipped": list(seen.skipped),
        "length": asdict(lengths),
        "seconds_per_completion": seen.seconds_per_row,
        "slowest": {"name": seen.slowest[0], "seconds": seen.slowest[1]},
        "findings": [asdict(finding) for finding in found],
    }


def _about_lengths(lengths: Lengths) -> str:
    if math.isnan(lengths.correlation):
        return f"correlation of the score with length: none ({lengths.count} {lengths.of})"
    return (
        f"correlation of the score with length: {lengths.correlation:+.2f} "
        f"({lengths.count} {lengths.of})"
    )


def _percent(value: float) -> str:
    return "?" if math.isnan(value) or math.isinf(value) else f"{100 * value:.0f} %"


def _cut(text: str) -> str:
    line = printable(text[:_SHOWN])
    return line[:_SHOWN] + ("…" if len(text) > _SHOWN or len(line) > _SHOWN else "")
