"""``gruppo preflight``: print what a few groups say of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from gruppo.cli.progress import duration
from gruppo.cli.written import say, show_findings, show_table, write_json
from gruppo.preflight import Report, preflight
from gruppo.recipe import Recipe

_GIB = 2**30


def run(
    recipe: Recipe,
    *,
    groups: int,
    output: Path | None,
    console: Console,
    report: Callable[[str], None],
) -> int:
    """Try ``recipe`` on ``groups`` groups and print what was found."""
    found = preflight(recipe, groups=groups, report=report)
    _show(recipe, found, console)
    if output is not None:
        write_json(output, as_table(found))
        say(console, f"written: {output}")
    return 0


def as_table(found: Report) -> dict[str, Any]:
    """Everything as plain data."""
    plain = asdict(found)
    plain["seconds"] = found.timing.seconds()
    for name, plan in (("memory", found.memory), ("memory_full", found.memory_full)):
        if plan is not None:
            plain[name]["peak"] = plan.peak
    return plain


def _show(recipe: Recipe, found: Report, console: Console) -> None:
    say(
        console,
        f"{found.groups} groups, {found.completions} completions, drawn in "
        f"{duration(found.took_seconds)}; 95 % intervals in brackets\n",
    )
    if found.pass_rate is not None:
        say(console, f"task reward, mean over problems: {found.pass_rate.text()}")
        rows = [(name, share.text()) for name, share in found.histogram.items()]
        show_table(console, ("pass rate", "share of problems"), rows)
    say(console, f"groups with equal totals, so no signal at all: {found.no_signal.text()}\n")
    _sizes(recipe, found, console)
    say(console, f"completions cut by rollout.max_tokens: {found.truncation.text()}")
    say(console, f"tokens of a completion: {_spread(found.length)}")
    say(console, f"tokens of a prompt: {_spread(found.prompt)}")
    say(console, f"reward: {1000 * found.reward_seconds:.2f} ms a completion\n")
    _costs(recipe, found, console)
    say(console)
    for line in found.knobs:
        say(console, line)
    say(console)
    show_findings(console, found.advice)
    if not found.advice:
        say(console, "no warnings")


def _sizes(recipe: Recipe, found: Report, console: Console) -> None:
    own = recipe.rollout.group_size
    marks = {own: "the recipe's"}
    if found.worth is not None:
        marks[found.worth] = "cheapest" if found.worth != own else "the recipe's, cheapest"
    rows = [
        (
            str(size.dead.group),
            f"{size.dead.share.text()}{'' if size.dead.method == 'counted' else ' *'}",
            f"{size.seconds:.3g}",
            f"{size.seconds_per_live:.3g}" if size.dead.share.value < 1 - 1e-6 else "never",
            marks.get(size.dead.group, ""),
        )
        for size in found.sizes
    ]
    head = ("completions a group", "dead groups", "s a group", "s a live group", "")
    show_table(console, head, rows)
    if any(size.dead.method == "modelled" for size in found.sizes):
        say(console, "* more than were drawn: pass rates are taken to be Beta distributed")
    say(console)


def _costs(recipe: Recipe, found: Report, console: Console) -> None:
    phases = ", ".join(
        f"{name} {seconds:.2g}"
        for name, seconds in found.timing.seconds().items()
        if name != "step" and seconds >= 0.005
    )
    say(console, f"a step: about {found.timing.step:.3g} s ({phases})")
    say(
        console,
        f"the run: about {duration(found.run_seconds)} for {recipe.train.steps} steps and "
        f"evaluations ({duration(found.evaluation_seconds)}), checkpoints not counted",
    )
    if found.memory is None or found.memory_full is None:
        say(console, f"memory: not known ({found.memory_unknown})")
    else:
        full = f"; {found.memory_full.peak / _GIB:.1f} GiB if every group teaches"
        there = "" if found.available is None else f"; {found.available / _GIB:.1f} GiB are there"
        say(console, found.memory.text() + full + there)
    many = "" if found.updates_per_rollout == 1 else f", {found.updates_per_rollout} a step"
    say(console, f"optimizer steps: {found.optimizer_steps:,}{many}")


def _spread(values: dict[str, float]) -> str:
    return (
        f"mean {values['mean']:.1f}, median {values['p50']:g}, 95 % within {values['p95']:g}, "
        f"longest {values['max']:g}"
    )
