"""A run on disk: started from a recipe, or taken up again from its directory.

It joins the parts of ``build`` with the run directory, its database and its trackers, and makes
sure that all of them are closed. The loop itself is ``gruppo.train``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gruppo.policy import checkpoint
from gruppo.recipe.build import Parts, Report, resolve
from gruppo.recipe.dump import dump
from gruppo.recipe.keeper import RunKeeper, read_checkpoint
from gruppo.recipe.load import from_table
from gruppo.recipe.recipe import Recipe
from gruppo.recipe.source import parse
from gruppo.record import Database, RunDirectory
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
        OSError: a file, download or hub failed.
    """
    with ExitStack() as stack:
        directory = None
        if path.exists():  # most likely it is taken: say so before a model is opened
            directory = stack.enter_context(RunDirectory.create(path, dump(recipe)))
        parts = _resolve(stack, recipe, report)
        if directory is None:
            directory = stack.enter_context(RunDirectory.create(path, dump(recipe)))
        yield _open(stack, parts, directory, callbacks=callbacks)


@contextmanager
def resume(path: Path, report: Report, *, callbacks: Sequence[Callback] = ()) -> Iterator[Session]:
    """Open the run in ``path`` as it was after its newest intact checkpoint.

    Raises:
        ValueError: it is no run, in use, or made with other data or another model.
        OSError: a file failed, or every checkpoint is damaged.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(RunDirectory.open(path))
        recipe = read_recipe(directory)
        parts = _resolve(stack, recipe, report)
        session = _open(stack, parts, directory, callbacks=callbacks)
        found, damaged = checkpoint.latest(directory.checkpoints)
        for text in damaged:
            report(f"damaged, passed over: {text}")
        if found is None:  # it ended before its first checkpoint: from the start
            session.database.truncate_after(0)
            yield session
        else:
            yield _restored(session, found)


def read_recipe(directory: RunDirectory) -> Recipe:
    """The recipe that a run was started with."""
    file = directory.path / "recipe.toml"
    return from_table(parse(directory.recipe_text(), str(file)), str(file))


def _resolve(stack: ExitStack, recipe: Recipe, report: Report) -> Parts:
    torch.manual_seed(recipe.train.seed)
    parts = resolve(recipe, report)
    stack.callback(parts.close)
    return parts


def _open(
    stack: ExitStack, parts: Parts, directory: RunDirectory, *, callbacks: Sequence[Callback]
) -> Session:
    recipe = parts.recipe
    database = stack.enter_context(Database(directory.database, detail=recipe.record.detail))
    keeper = RunKeeper(
        directory=directory,
        database=database,
        policy=parts.policy,
        tokenizer=parts.opened.loaded.tokenizer,
        settings=recipe.record,
        adapter=recipe.model.lora is not None,
    )
    trackers = []
    for kind in recipe.record.trackers:
        trackers.append(kind.start(directory, last_step=database.last_step()))
        stack.callback(trackers[-1].close)
    run = Run(
        policy=parts.policy,
        engine=parts.opened.engine,
        rollouts=parts.rollouts,
        objective=parts.objective,
        settings=recipe.train,
        keeper=keeper,
        evaluator=parts.evaluator,
        callbacks=(*callbacks, *trackers),
    )
    return Session(directory=directory, database=database, parts=parts, run=run, state=None)


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


def _restored(session: Session, folder: Path) -> Session:
    """The session as it was when ``folder`` was saved; what was recorded later is dropped."""
    run = session.run
    state = restore(session.parts, folder)
    session.database.truncate_after(state.step)
    session.database.write_event(state.step, "resumed", {"checkpoint": folder.name})
    assert isinstance(run.keeper, RunKeeper), "made by _open"
    run.keeper.saved = state.step
    return Session(
        directory=session.directory,
        database=session.database,
        parts=session.parts,
        run=run,
        state=state,
    )
