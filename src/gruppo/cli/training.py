"""What ``train``, ``quickstart`` and ``resume`` do once the recipe is known to be sound.

This module imports everything heavy; the verbs import it late.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from gruppo.cli.progress import Reporter
from gruppo.cli.summary import summarise
from gruppo.recipe import Recipe
from gruppo.recipe.keeper import read_evaluation
from gruppo.recipe.session import Session, read_recipe, run_path
from gruppo.recipe.session import resume as reopen
from gruppo.recipe.session import start as open_new
from gruppo.record import RunDirectory
from gruppo.train import train


def start(recipe: Recipe, name: str, console: Console, *, began: float) -> int:
    """Train by ``recipe``; ``name`` is what the run is called if the recipe does not say.

    ``train.time_limit_s`` counts from ``began``, a value of ``time.monotonic()``.
    """
    reporter = Reporter(recipe.train.steps, console)
    path = run_path(recipe, name)
    with open_new(
        recipe,
        path,
        reporter.say,
        callbacks=(reporter,),
        listeners=(reporter.evaluated,),
        began=began,
    ) as session:
        reporter.say(f"run: {path}")
        return _run(session, reporter)


def resume(path: Path, console: Console, *, began: float) -> int:
    """Go on with the run in ``path``; ``train.time_limit_s`` counts from ``began``."""
    with RunDirectory.open(path, lock=False) as directory:
        steps = read_recipe(directory).train.steps
    reporter = Reporter(steps, console)
    with reopen(
        path,
        reporter.say,
        callbacks=(reporter,),
        listeners=(reporter.evaluated,),
        began=began,
    ) as session:
        reporter.say(f"run: {path}, going on after step {_done(session)} of {steps}")
        return _run(session, reporter)


def _run(session: Session, reporter: Reporter) -> int:
    with reporter.showing(_done(session)):
        outcome = train(session.run, session.state)
    # what an earlier process of this run has seen is in the database
    parts = session.parts.reward.part_names
    before = outcome.before or read_evaluation(session.database, 0, parts)
    after = outcome.after or read_evaluation(session.database, outcome.state.step, parts)
    outcome = replace(outcome, before=before, after=after)
    reporter.say(summarise(outcome, session.directory.path, session.sandboxes))
    return 0


def _done(session: Session) -> int:
    return session.state.step if session.state is not None else 0
