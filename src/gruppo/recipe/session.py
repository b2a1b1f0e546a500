"""A run on disk: started from a recipe, or taken up again from its directory.

It joins the parts of ``build`` with the run directory, its database and its trackers, and makes
sure that all of them are closed. The loop itself is ``gruppo.train``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gruppo.budget import Budget
from gruppo.policy import checkpoint
from gruppo.recipe.build import Parts, Report, resolve
from gruppo.recipe.dump import dump
from gruppo.recipe.keeper import RunKeeper, bytes_needed, read_checkpoint
from gruppo.recipe.load import from_table
from gruppo.recipe.recipe import Recipe
from gruppo.recipe.source import override, parse
from gruppo.record import Database, RunDirectory, Tracker, check_unused, library
from gruppo.train import Run, TrainState
from gruppo.types import Callback


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """An open run: hand ``run`` and ``state`` (None: from the start) to ``gruppo.train.train``."""

    directory: RunDirectory
    database: Database
    parts: Parts
    run: Run
    state: TrainState | None


def run_path(recipe: Recipe, name: str) -> Path:
    """The folder that a new run of ``recipe`` gets; ``name`` is what the recipe is called."""
    chosen = recipe.record.name or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(recipe.record.folder).expanduser() / chosen


@contextmanager
def start(
    recipe: Recipe, path: Path, report: Report, *, callbacks: Sequence[Callback] = ()
) -> Iterator[Session]:
    """Open everything for a new run, then make its directory ``path``.

    Nothing is written before all parts are there. Raises:
        ValueError: the directory is in use, or something in the recipe cannot be used.
        ImportError: a tracker is not installed.
        OSError: a file, download or hub failed, or the disk is too small for a checkpoint.
    """
    budget = Budget()
    check_unused(path)  # most likely it is taken: say so before a model is opened
    for tracker in recipe.record.trackers:
        library(tracker.kind)
    with ExitStack() as stack:
        parts = _resolve(stack, recipe, report)
        _check_space(parts, path)
        asked = {key: value for key, value in _chosen(recipe) if value == "auto"}
        meta = {"asked": asked} if asked else {}
        directory = stack.enter_context(RunDirectory.create(path, dump(parts.recipe), meta=meta))
        database = stack.enter_context(_database(directory, recipe))
        told = (*callbacks, *_trackers(stack, directory, recipe, resumed_after=None))
        yield _session(parts, directory, database, state=None, callbacks=told, budget=budget)


@contextmanager
def resume(path: Path, report: Report, *, callbacks: Sequence[Callback] = ()) -> Iterator[Session]:
    """Open the run in ``path`` as it was after its newest intact checkpoint.

    Raises:
        ValueError: it is no run, in use, made with other data or another model, or on a device
            that is not here.
        ImportError: a tracker is not installed.
        OSError: a file failed, or every checkpoint is damaged.
    """
    budget = Budget()
    with ExitStack() as stack:
        directory = stack.enter_context(RunDirectory.open(path))
        recipe = read_recipe(directory)
        parts = _resolve(stack, recipe, report)
        _check_space(parts, path)
        database = stack.enter_context(_database(directory, recipe))
        state = _go_back(parts, directory, database, report)
        last = database.last_step()
        told = (*callbacks, *_trackers(stack, directory, recipe, resumed_after=last))
        yield _session(parts, directory, database, state=state, callbacks=told, budget=budget)


def read_recipe(directory: RunDirectory, settings: Iterable[str] = ()) -> Recipe:
    """The recipe that a run was started with, changed by ``section.key=value`` settings."""
    file = directory.path / "recipe.toml"
    table = override(parse(directory.recipe_text(), str(file)), settings)
    return from_table(table, str(file))


def _resolve(stack: ExitStack, recipe: Recipe, report: Report) -> Parts:
    torch.manual_seed(recipe.train.seed)
    parts = resolve(recipe, report)
    stack.callback(parts.close)
    return parts


def _chosen(recipe: Recipe) -> list[tuple[str, str]]:
    """What a recipe may leave to the machine."""
    return [("model.device", recipe.model.device), ("model.compute", recipe.model.compute)]


def _check_space(parts: Parts, path: Path) -> None:
    """Refuse a run whose checkpoint the disk cannot hold, before the hours that lead to one."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    need = bytes_needed(
        parts.policy,
        adapter=parts.recipe.model.lora is not None,
        moves_reference=parts.recipe.train.reference_sync_steps > 0,
    )
    checkpoint.check_space(there, need)


def _database(directory: RunDirectory, recipe: Recipe) -> Database:
    return Database(directory.database, detail=recipe.record.detail)


def _trackers(
    stack: ExitStack, directory: RunDirectory, recipe: Recipe, *, resumed_after: int | None
) -> list[Tracker]:
    started = []
    for kind in recipe.record.trackers:
        started.append(kind.start(directory, resumed_after=resumed_after))
        stack.callback(started[-1].close)
    return started


def _session(
    parts: Parts,
    directory: RunDirectory,
    database: Database,
    *,
    state: TrainState | None,
    callbacks: tuple[Callback, ...],
    budget: Budget,
) -> Session:
    recipe = parts.recipe
    keeper = RunKeeper(
        directory=directory,
        database=database,
        policy=parts.policy,
        tokenizer=parts.opened.loaded.tokenizer,
        settings=recipe.record,
        adapter=recipe.model.lora is not None,
        saved=state.step if state is not None else None,
    )
    run = Run(
        policy=parts.policy,
        engine=parts.opened.engine,
        rollouts=parts.rollouts,
        objective=parts.objective,
        settings=recipe.train,
        keeper=keeper,
        evaluator=parts.evaluator,
        callbacks=callbacks,
        budget=budget,
    )
    return Session(directory=directory, database=database, parts=parts, run=run, state=state)


def _go_back(
    parts: Parts, directory: RunDirectory, database: Database, report: Report
) -> TrainState | None:
    """Put everything as it was at the newest intact checkpoint; drop what was recorded later."""
    found, damaged = checkpoint.latest(directory.checkpoints)
    for text in damaged:
        report(f"damaged, passed over: {text}")
    if found is None:  # it ended before its first checkpoint: from the start
        database.truncate_after(0)
        return None
    state = restore(parts, found)
    database.truncate_after(state.step)
    database.write_event(state.step, "resumed", {"checkpoint": found.name})
    return state


def restore(parts: Parts, folder: Path) -> TrainState:
    """Put everything as it was when the checkpoint ``folder`` was saved; returns the loop's state.

    Raises:
        ValueError: the checkpoint is of another model, or the data have changed.
        OSError: a file is missing or damaged.
    """
    state = read_checkpoint(folder, parts.policy)
    parts.rollouts.restore(state.rollouts)
    parts.opened.engine.load(None, parts.policy.version)
    torch.set_rng_state(state.rng)
    return state
