"""The command line: verbs, their arguments and help. Each does its work in another module.

Heavy modules are imported inside the verbs, so that help answers at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from gruppo import __version__
from gruppo.bench.work import Work
from gruppo.cli.errors import USER_ERROR, exit_code, explain
from gruppo.interrupt import Interrupted, unwrapped, whole_process

app: Final = App(
    name="gruppo",
    version=__version__,
    help="Post-train language models with GRPO. Start with: gruppo quickstart",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # it would make every interrupt an exit code of 130
    default_parameter=Parameter(negative="", show_default=False),
)
export: Final = App(name="export", help="Take a run's model or its completions out.")
app.command(export)
reward: Final = App(name="reward", help="Find out what a recipe's reward pays for.")
app.command(reward)

Settings = Annotated[
    tuple[str, ...],
    Parameter(name="--set", help="Change a key: section.key=value. Repeatable."),
]
Recipe = Annotated[str, Parameter(help="A .toml file, or a packaged recipe's name.")]
Run = Annotated[Path, Parameter(help="The folder of a run.")]
_WORK: Final = Work()
Step = Annotated[int | None, Parameter(help="Checkpoint of this step, not the newest.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Errors are explained on standard error.

    Without ``arguments`` those of the process are taken, and its signals are handled to its end.
    """
    if arguments is not None:
        return _run(list(arguments))
    try:
        with whole_process():
            return _run(sys.argv[1:])
    except Interrupted as error:  # between the last words and the end
        return error.exit_code


def _run(tokens: list[str]) -> int:
    if "" not in sys.path:
        sys.path.append("")  # custom parts may lie in the current folder
    try:
        with unwrapped():
            code = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        _tell(f"error: {error}\nSee: gruppo --help")
        return USER_ERROR
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else USER_ERROR
    except BaseException as error:
        _tell(explain(error))
        return exit_code(error)
    return code if isinstance(code, int) else 0


@app.command
def quickstart(*, set: Settings = ()) -> int:
    """Train a small model on this machine's CPU, from nothing, in minutes."""
    return train("quickstart", set=set)


@app.command
def train(recipe: Recipe, *, set: Settings = (), dry_run: bool = False) -> int:
    """Train by a recipe.

    Parameters
    ----------
    dry_run: bool
        Print the recipe with all its values, the batch arithmetic and the memory; train nothing.
    """
    began = time.monotonic()  # what is imported below counts for train.time_limit_s
    from gruppo.recipe import load

    checked = load(recipe, set)
    console = Console()
    if dry_run:
        from gruppo.plan import told
        from gruppo.recipe.describe import describe
        from gruppo.recipe.dump import dump

        words = f"{describe(checked)}\n{told(checked)}"
        _say(console, f"{dump(checked)}\n# " + words.replace("\n", "\n# "))
        return 0
    from gruppo.cli.training import start

    return start(checked, Path(recipe).stem, console, began=began)


@app.command
def resume(
    run: Run,
    *,
    replay: Annotated[int | None, Parameter(help="Run this step again; record nothing.")] = None,
    verify: Annotated[
        int | None,
        Parameter(help="Run so many steps up to the newest checkpoint again, and compare."),
    ] = None,
) -> int:
    """Go on with an interrupted run, after its last finished step."""
    began = time.monotonic()
    if verify is not None and replay is not None:
        raise ValueError("--replay and --verify are two things: give one of them")
    if verify is not None:
        from gruppo.cli.verify import verify as compare

        return compare(run, verify, _tell)
    if replay is not None:
        from gruppo.cli.replay import replay as run_again

        return run_again(run, replay, _tell)
    from gruppo.cli.training import resume as go_on

    return go_on(run, Console(), began=began)


@app.command(name="eval")
def evaluate(
    target: Annotated[str, Parameter(help="A run's folder, or a recipe (its untrained model).")],
    *,
    step: Step = None,
    set: Settings = (),
) -> int:
    """Evaluate on the held-out problems."""
    from gruppo.cli import models

    return models.evaluate(target, set, step=step, console=Console(), report=_tell)


@reward.command(name="test")
def reward_test(
    recipe: Recipe,
    *,
    set: Settings = (),
    threshold: float = 0.5,
    problems: int = 8,
    samples: int = 0,
    json: Path | None = None,
) -> int:
    """Attack a recipe's reward with made completions; exit code 1 if something is wrong with it.

    Parameters
    ----------
    threshold: float
        An attack with more than this share of the right answer's score is an exploit (0.5).
    problems: int
        Problems of the data that attacks are made for (8).
    samples: int
        Draw so many completions from the model too: does the reward follow their length?
    json: Path
        File to write everything to.
    """
    from gruppo.cli.lab import run
    from gruppo.recipe import load

    return run(
        load(recipe, set),
        threshold=threshold,
        problems=problems,
        samples=samples,
        output=json,
        console=Console(),
        report=_tell,
    )


@app.command
def preflight(
    recipe: Recipe, *, set: Settings = (), groups: int = 32, json: Path | None = None
) -> int:
    """Try a recipe on a few groups: what would a run cost, and could it teach anything?

    Parameters
    ----------
    groups: int
        Groups to draw (32).
    json: Path
        File to write everything to.
    """
    from gruppo.cli.preflight import run
    from gruppo.recipe import load

    return run(load(recipe, set), groups=groups, output=json, console=Console(), report=_tell)


@export.command
def weights(
    run: Run,
    output: Annotated[Path, Parameter(help="Folder to make.")],
    *,
    step: Step = None,
) -> int:
    """Write a model folder that transformers and vLLM load; an adapter is merged in."""
    from gruppo.cli.models import export_weights

    return export_weights(run, output, step=step, report=_tell)


@export.command
def samples(run: Run, output: Annotated[Path, Parameter(help="File to write.")]) -> int:
    """Write the stored completions as JSON lines."""
    from gruppo.cli.models import export_stored_samples

    return export_stored_samples(run, output, report=_tell)


@app.command
def chat(
    target: Annotated[str, Parameter(help="A run's folder, or any model's name.")],
    *,
    prompt: Annotated[str | None, Parameter(help="Answer this once and end.")] = None,
    set: Settings = (),
) -> int:
    """Talk to a model."""
    from gruppo.cli import models

    return models.chat(target, prompt, set, console=Console(), report=_tell)


@app.command
def models() -> int:
    """List models that can be had from PyPI, and those in the cache."""
    from gruppo.cli.models import list_models

    return list_models(Console())


@app.command
def recipes(
    name: Annotated[str | None, Parameter(help="Print this recipe.")] = None,
    *,
    presets: bool = False,
    planned: bool = False,
) -> int:
    """List the packaged recipes, or print one.

    Parameters
    ----------
    presets: bool
        List the objectives that a recipe can name, with their sources.
    planned: bool
        List published variants that still lack a part, and which.
    """
    from gruppo.cli.listing import list_planned, list_presets, list_recipes, show_recipe

    console = Console()
    if presets:
        return list_presets(console)
    if planned:
        return list_planned(console)
    return list_recipes(console) if name is None else show_recipe(name, console)


@app.command
def bench(  # noqa: PLR0913 - the options of a command
    work: Annotated[Work, Parameter(name="*")] = _WORK,
    *,
    curves: tuple[str, ...] = (),
    vs: Literal["trl"] | None = None,
    trl_python: str = sys.executable,
    trl_micro_batch: int = 8,
    trl_weights: Literal["compute", "float32"] = "compute",
    rounds: int = 2,
    output: Path | None = None,
) -> int:
    """Measure a training step on this machine, phase by phase, or against TRL.

    Parameters
    ----------
    curves: tuple
        How cost grows with group, prompt_tokens, max_tokens or prompts. Repeatable.
    vs: Literal
        Run TRL on the same work too, in turns.
    trl_python: str
        Python of an environment that has TRL.
    trl_micro_batch: int
        Completions in one of TRL's forward passes.
    trl_weights: Literal
        Type of TRL's weights: that of the products, or float32 under autocast.
    rounds: int
        Turns of each system.
    output: Path
        JSON file to write; a plot of the curves goes beside it.
    """
    from gruppo.bench.versus import Trl
    from gruppo.cli.benchmarks import run

    trl = Trl(python=trl_python, micro_batch=trl_micro_batch, weights=trl_weights)
    return run(
        work,
        curves=curves,
        trl=trl if vs else None,
        rounds=rounds,
        output=output,
        console=Console(),
    )


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
