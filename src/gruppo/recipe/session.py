"""A run on disk: started from a recipe, or taken up again from its directory.

It joins the parts of ``build`` with the run directory, its database and its trackers, and makes
sure that all of them are closed. The loop itself is ``gruppo.train``.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gruppo import native
from gruppo.budget import Budget
from gruppo.environment import Python
from gruppo.interrupt import ending_with
from gruppo.measured import processor
from gruppo.policy import checkpoint
from gruppo.recipe.build import Parts, Report, resolve
from gruppo.recipe.dump import dump
from gruppo.recipe.keeper import RunKeeper, bytes_needed, read_checkpoint
from gruppo.recipe.load import from_table
from gruppo.recipe.recipe import Recipe
from gruppo.recipe.source import override, parse
from gruppo.record import Database, RunDirectory, Tracker, check_unused, client_of, scrub_values
from gruppo.reward import Code
from gruppo.sandbox import choose
from gruppo.train import Run, TrainState
from gruppo.types import Callback, Listener


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """An open run: hand ``run`` and ``state`` (None: from the start) to ``gruppo.train.train``.

    ``sandboxes`` says how programs that the model writes are run, by reward part or "environment".
    """

    directory: RunDirectory
    database: Database
    parts: Parts
    run: Run
    state: TrainState | None
    sandboxes: Mapping[str, str]


def run_path(recipe: Recipe, name: str) -> Path:
    """The folder that a new run of ``recipe`` gets; ``name`` is what the recipe is called."""
    chosen = recipe.record.name or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(recipe.record.folder).expanduser() / chosen


@contextmanager
def start(
    recipe: Recipe,
    path: Path,
    report: Report,
    *,
    callbacks: Sequence[Callback] = (),
    listeners: Sequence[Listener] = (),
    began: float | None = None,
) -> Iterator[Session]:
    """Open everything for a new run, then make its directory ``path``.

    Nothing is written before all parts are there, and nothing is left if a tracker cannot start.

    Args:
        recipe: What to train, and how.
        path: The folder to make.
        report: Told what is slow or worth knowing, in words.
        callbacks: Called with ``(step, groups, metrics)`` after every step.
        listeners: Called with ``(step, metrics)`` after every evaluation.
        began: When ``train.time_limit_s`` began to count (``time.monotonic()``); None: now.

    Raises:
        ValueError: the directory is in use, or something in the recipe cannot be used.
        ImportError: a tracker is not installed.
        OSError: a file, download or hub failed, the disk is too small for a checkpoint, or a
            tracker cannot be started.
    """
    budget = _budget(began)
    check_unused(path)  # most likely it is taken: say so before a model is opened
    for tracker in recipe.record.trackers:
        client_of(tracker.kind)
    with ExitStack() as stack:
        parts = _resolve(stack, recipe, report)
        _check_space(parts, path)
        boxes = _sandboxes(parts, report)
        meta = _meta(recipe, boxes)
        existed = path.exists()
        directory = stack.enter_context(RunDirectory.create(path, dump(parts.recipe), meta=meta))
        try:
            database = stack.enter_context(_database(directory, recipe))
            trackers = _trackers(stack, directory, recipe, redone_from=None)
        except BaseException:
            stack.close()
            shutil.rmtree(path, ignore_errors=True)  # it was empty or not there
            if existed:
                path.mkdir()
            raise
        run = _run(parts, directory, database, state=None, budget=budget)
        run = _told(run, callbacks, listeners, trackers)
        yield Session(
            directory=directory,
            database=database,
            parts=parts,
            run=run,
            state=None,
            sandboxes=boxes,
        )


def _sandboxes(parts: Parts, report: Report) -> dict[str, str]:
    """How the programs of each code reward and of the environment are run, in words.

    Of the rewards it was reported when they were opened.
    """
    rewards = {part.name: part.reward for part in parts.reward.parts}
    told = {name: code.open().text for name, code in rewards.items() if isinstance(code, Code)}
    use = parts.recipe.environment.use
    if isinstance(use, Python):
        told["environment"] = choose(use.sandbox).text
        report(f"environment: {told['environment']}")
    return told


@contextmanager
def resume(
    path: Path,
    report: Report,
    *,
    callbacks: Sequence[Callback] = (),
    listeners: Sequence[Listener] = (),
    began: float | None = None,
) -> Iterator[Session]:
    """Open the run in ``path`` as it was after its newest intact checkpoint.

    The arguments are those of ``start``.

    Raises:
        ValueError: it is no run, in use, made with other data or another model, or on a device
            that is not here.
        ImportError: a tracker is not installed.
        OSError: a file failed, every checkpoint is damaged, or a tracker cannot be started.
    """
    budget = _budget(began)
    with ExitStack() as stack:
        directory = stack.enter_context(RunDirectory.open(path))
        recipe = read_recipe(directory)
        for tracker in recipe.record.trackers:
            client_of(tracker.kind)
        parts = _resolve(stack, recipe, report)
        _check_space(parts, path)
        _tell_changes(directory, report)
        boxes = _sandboxes(parts, report)
        database = stack.enter_context(_database(directory, recipe))
        state = _go_back(parts, directory, database, report)
        _keep_boxes(directory, boxes, 0 if state is None else state.step, report)
        trackers = _trackers(stack, directory, recipe, redone_from=_redone_from(state))
        run = _run(parts, directory, database, state=state, budget=budget)
        run = _told(run, callbacks, listeners, trackers)
        yield Session(
            directory=directory,
            database=database,
            parts=parts,
            run=run,
            state=state,
            sandboxes=boxes,
        )


def _meta(recipe: Recipe, boxes: Mapping[str, str]) -> dict[str, object]:
    """What run.json says of a run beside versions and platform."""
    asked = {key: value for key, value in _chosen(recipe) if value == "auto"}
    named = {"asked": asked, "sandbox": boxes}
    return {"computing": computing(), **{key: value for key, value in named.items() if value}}


def computing() -> dict[str, object]:
    """What else decides a run's last bits, beside the recipe and the versions of packages."""
    kernels = "compiled" if native.kernels() is not None else "none"
    name = processor().partition("\n")[0].rpartition(": ")[2]
    known = hashlib.sha256(processor().encode()).hexdigest()[:8]  # its instructions count too
    return {
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "processor": f"{name} ({known})",
        "torch": torch.__version__,
    }


def _tell_changes(directory: RunDirectory, report: Report) -> None:
    """Say what would make a resumed run differ from an unbroken one by rounding."""
    meta = directory.info["meta"]
    before = meta.get("computing") if isinstance(meta, Mapping) else None
    if not isinstance(before, Mapping):  # a run of an earlier version
        return
    for name, now in computing().items():
        if name in before and before[name] != now:
            report(
                f"resumed with {name} {now!r} where the run had {before[name]!r}: from here on it "
                "may differ by rounding from a run that was never interrupted"
            )


def _keep_boxes(
    directory: RunDirectory, boxes: Mapping[str, str], step: int, report: Report
) -> None:
    """Record how programs are run from ``step`` on, where it is otherwise than before, and say so.

    run.json keeps what the run began with beside it: what a program could reach, and how many were
    scored, may have changed in between.
    """
    now, meta = scrub_values(boxes), directory.info["meta"]
    assert isinstance(now, Mapping)
    if not isinstance(meta, Mapping):
        return
    later = list(meta.get("sandbox_later", []))
    before = later[-1]["sandbox"] if later else meta.get("sandbox", {})
    if now == before:
        return
    for name, text in now.items():
        if name in before and before[name] != text:
            report(f"resumed with {name}: {text}; where the run had: {before[name]}")
    directory.remember("sandbox_later", [*later, {"after_step": step, "sandbox": now}])


def _budget(began: float | None) -> Budget:
    return Budget() if began is None else Budget(began=began)


def _redone_from(state: TrainState | None) -> int:
    """The first step whose metrics a resumed run gives again; 0 is the evaluation before it."""
    if state is None or (state.step == 0 and state.evaluated < 0):
        return 0
    return state.step + 1


def read_recipe(directory: RunDirectory, settings: Iterable[str] = ()) -> Recipe:
    """The recipe that a run was started with, changed by ``section.key=value`` settings."""
    file = directory.path / "recipe.toml"
    table = override(parse(directory.recipe_text(), str(file)), settings)
    return from_table(table, str(file))


def _resolve(stack: ExitStack, recipe: Recipe, report: Report) -> Parts:
    torch.manual_seed(recipe.train.seed)
    parts = resolve(recipe, report)
    stack.callback(parts.close)
    stack.enter_context(ending_with(parts.reward.close))
    return parts


def _chosen(recipe: Recipe) -> list[tuple[str, str]]:
    """What a recipe may leave to the machine."""
    return [
        ("model.device", recipe.model.device),
        ("model.compute", recipe.model.compute),
        ("model.products", recipe.model.products),
    ]


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
    stack: ExitStack, directory: RunDirectory, recipe: Recipe, *, redone_from: int | None
) -> list[Tracker]:
    started = []
    for tracker in recipe.record.trackers:
        try:
            started.append(tracker.start(directory, redone_from=redone_from))
        except Exception as error:  # a login, the network: each library raises classes of its own
            raise OSError(
                f"record.trackers: {tracker.kind} could not be started: {error}. Mend that (a "
                "login, the network), or take it out of record.trackers in the recipe; a run that "
                "is resumed has its own in its folder, recipe.toml"
            ) from error
        stack.callback(started[-1].close)
    return started


def _told(
    run: Run,
    callbacks: Sequence[Callback],
    listeners: Sequence[Listener],
    trackers: Sequence[Tracker],
) -> Run:
    """The run with all who are told of its steps and of its evaluations."""
    return replace(
        run,
        callbacks=(*callbacks, *trackers),
        listeners=(*listeners, *(tracker.evaluated for tracker in trackers)),
    )


def _run(
    parts: Parts,
    directory: RunDirectory,
    database: Database,
    *,
    state: TrainState | None,
    budget: Budget,
) -> Run:
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
    return Run(
        policy=parts.policy,
        engine=parts.opened.engine,
        rollouts=parts.rollouts,
        objective=parts.objective,
        settings=recipe.train,
        keeper=keeper,
        evaluator=parts.evaluator,
        budget=budget,
    )


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
