"""What ``eval``, ``export``, ``chat`` and ``models`` do. Everything heavy comes with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from gruppo.cli.summary import describe_evaluation
from gruppo.cli.written import printable
from gruppo.engine.base import SingleTurn
from gruppo.interrupt import ending_with
from gruppo.model import CATALOG, cache_folder
from gruppo.model.packaged import quiet
from gruppo.model.parts import context_length
from gruppo.recipe import Recipe, load
from gruppo.recipe.build import (
    Opened,
    Report,
    make_evaluator,
    make_sampler,
    open_model,
    open_rewards,
)
from gruppo.recipe.problems import open_problems, prompt_limit
from gruppo.recipe.trained import is_run, open_trained
from gruppo.record import Database, RunDirectory, export_samples
from gruppo.types import Message, Problem, Request


def evaluate(
    target: str, settings: Iterable[str], *, step: int | None, console: Console, report: Report
) -> int:
    """Evaluate a run's model, or a recipe's untrained one, on the held-out problems."""
    path = Path(target).expanduser()
    if is_run(path):
        trained = open_trained(path, report, step=step, settings=settings)
        recipe, opened = trained.recipe, trained.opened
    else:
        recipe = load(target, settings)
        opened = open_model(recipe.model, recipe, report)
    problems = open_problems(
        recipe.data,
        opened.encoder.encode,
        report,
        max_prompt_tokens=prompt_limit(recipe, context_length(opened.model)),
        environment=opened.environment,
    )
    reward = open_rewards(recipe, report)
    try:
        evaluator = make_evaluator(recipe, opened, reward, problems)
        if evaluator is None:
            raise ValueError("there is nothing to evaluate on: set data.held_out or data.test")
        with ending_with(reward.close):
            evaluation = evaluator()
    finally:
        reward.close()
        opened.engine.close()
    _say(console, "\n".join(describe_evaluation(evaluation)))
    return 0


def export_weights(run: Path, output: Path, *, step: int | None, report: Report) -> int:
    """Write a run's model as a folder that transformers and vLLM load."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; choose another name")
    # merging takes no accelerator, and the machine that trained may be far away
    trained = open_trained(run, report, step=step, settings=["model.device=cpu"])
    output.mkdir(parents=True, exist_ok=True)
    with quiet():
        trained.policy.save_pretrained(output, trained.opened.loaded.tokenizer)
    report(f"{output}: the model after step {trained.step}, in Hugging Face format")
    return 0


def export_stored_samples(run: Path, output: Path, *, report: Report) -> int:
    """Write a run's stored completions as JSON lines."""
    with (
        RunDirectory.open(run, lock=False) as directory,
        Database(directory.database, read_only=True) as database,
    ):
        count = export_samples(database, output)
    report(f"{output}: {count:,} completions")
    return 0


def chat(
    target: str, prompt: str | None, settings: Iterable[str], *, console: Console, report: Report
) -> int:
    """Talk to a run's model, or to any model; with ``prompt`` answer once.

    An environment of the run answers the model's turns as in training; what it says is shown with
    its role before it.

    Raises:
        ValueError: the environment cannot be talked to (a game that needs a problem's answer, say).
    """
    recipe, opened = _open_for_chat(target, settings, report)
    said: tuple[Message, ...] = ()
    try:
        for turn, text in enumerate([prompt] if prompt is not None else _lines(console)):
            said = (*said, Message("user", text))
            for message in _answer(opened, recipe, said, turn):
                said = (*said, message)
                own = message.role == "assistant"
                text = message.content if own else f"[{message.role}] {message.content}"
                _say(console, printable(text, keep="\n\t"))
    finally:
        opened.engine.close()
    return 0


def _open_for_chat(target: str, settings: Iterable[str], report: Report) -> tuple[Recipe, Opened]:
    path = Path(target).expanduser()
    if is_run(path):
        trained = open_trained(path, report, settings=settings)
        return trained.recipe, trained.opened
    recipe = load("quickstart", settings)
    recipe = replace(recipe, model=replace(recipe.model, name=target))
    return recipe, open_model(recipe.model, recipe, report)


def _lines(console: Console) -> Iterator[str]:
    """What the user types, until an empty line or the end of input."""
    _say(console, "an empty line ends it")
    while True:
        try:
            text = console.input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        yield text


def _answer(
    opened: Opened, recipe: Recipe, said: tuple[Message, ...], turn: int
) -> tuple[Message, ...]:
    """The model's turn; with an environment all turns until it is the user's again."""
    problem = Problem(id=f"chat/{turn}", prompt=said)
    if opened.environment is not None:
        problem = replace(problem, prompt=opened.environment.prompt(problem))
    request = Request(tokens=opened.encoder.encode(problem.prompt), num_samples=1, key=(0, turn))
    sampler = make_sampler(recipe, opened) or SingleTurn(opened.engine)
    sampling = recipe.rollout.sampling(opened.encoder.stop_tokens)
    ((row,),) = sampler.draw([problem], [request], sampling)
    if row.interaction is None:
        return (Message("assistant", row.text),)
    if row.interaction.error is not None:
        raise ValueError(
            f"environment.use: {row.interaction.error}. In a chat it gets what you type and no "
            "more: no answer of a problem and no columns"
        )
    return row.interaction.messages


def list_models(console: Console) -> int:
    """Print the models that come from PyPI, and what is in the cache."""
    for name, model in CATALOG.items():
        _say(console, f"{name:<20} {model.description}; {model.wheel.size_mb} MB to download")
    _say(console, f"\nin {cache_folder()}:")
    folder = cache_folder() / "models"
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    for entry in found:
        if not entry.name.startswith("."):
            size = sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
            _say(console, f"  {entry.name} ({size / 1e6:,.0f} MB)")
    if not found:
        _say(console, "  nothing yet")
    _say(console, "\nA hub name (owner/model) or a folder with config.json works too.")
    return 0


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
