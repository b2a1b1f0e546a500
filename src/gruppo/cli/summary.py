"""What a run says at its end: before and after, two completions of each, and what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from gruppo.cli.written import printable
from gruppo.evaluate import Evaluation, Graded
from gruppo.train import Outcome, TrainState

_SHOWN: Final = 2  # problems whose completions are shown
_MAX_TEXT: Final = 400  # characters of a text worth showing
_ENDINGS: Final = {
    "steps": "all steps done",
    "time": "stopped by train.time_limit_s",
    "patience": "stopped by eval.patience: no better evaluation for a while",
}


def summarise(outcome: Outcome, path: Path, sandboxes: Mapping[str, str]) -> str:
    """The closing words of a finished run in ``path``; ``sandboxes``: how programs were run."""
    lines = [f"{_ENDINGS[outcome.ended_by]}: {outcome.state.step} steps, kept in {path}"]
    lines += [f"{name}: {text}" for name, text in sandboxes.items()]
    if outcome.before is not None and outcome.after is not None:
        lines += ["", *compare(outcome.before, outcome.after)]
        lines += show_changes(outcome.before.greedy, outcome.after.greedy)
    elif outcome.after is not None:
        lines += ["", *describe_evaluation(outcome.after)]
    return "\n".join([*lines, "", *_next_commands(path), *_best_command(outcome.state, path)])


def compare(before: Evaluation, after: Evaluation) -> Iterator[str]:
    """Held-out metrics before and after, one a line, with the standard error where there is one."""
    count = len(after.greedy or after.sampled)
    yield f"{count} held-out problems" + " " * 14 + "before    after"
    for name, value in after.metrics.items():
        if name in before.metrics and not name.endswith("_stderr"):
            error = after.metrics.get(f"{name}_stderr", math.nan)
            spread = "" if math.isnan(error) else f"  ± {error:.3f}"
            yield f"  {name:<28}{before.metrics[name]:>9.3f}{value:>9.3f}{spread}"


def describe_evaluation(evaluation: Evaluation) -> Iterator[str]:
    """An evaluation's metrics, one a line."""
    yield f"{len(evaluation.greedy or evaluation.sampled)} problems"
    for name, value in evaluation.metrics.items():
        yield f"  {name:<28}{value:>9.3f}"


def show_changes(before: Sequence[Graded], after: Sequence[Graded]) -> Iterator[str]:
    """Greedy completions of two problems before and after, those that were learned first."""
    known = {_key(graded): graded for graded in before}  # of a resumed run, some only
    pairs = [(known[_key(new)], new) for new in after if _key(new) in known]
    gains = sorted(pairs, key=lambda pair: -_gain(*pair))
    for old, new in gains[:_SHOWN]:
        yield ""
        yield f"problem: {_short(old.problem.prompt[-1].content if old.problem.prompt else '')}"
        yield f"  answer: {_short(str(old.problem.answer))}"
        for label, graded in (("before", old), ("after", new)):
            task = graded.scores[0].task
            score = "unscored" if task is None else f"reward {task:g}"
            yield f"  {label} ({score}): {_short(graded.completions[0].text)}"


def _key(graded: Graded) -> tuple[str, str]:
    return graded.problem.source, graded.problem.id


def _gain(old: Graded, new: Graded) -> float:
    return (new.scores[0].task or 0.0) - (old.scores[0].task or 0.0)


def _short(text: str) -> str:
    line = "\n    ".join(map(printable, text.strip().splitlines()))
    return line if len(line) <= _MAX_TEXT else line[: _MAX_TEXT - 1] + "…"


def _next_commands(path: Path) -> list[str]:
    run = shlex.quote(str(path))
    return [
        "next:",
        f"  gruppo chat {run}                     # talk to it",
        f"  gruppo eval {run} --set eval.samples=8  # pass@k on the held-out problems",
        f"  gruppo export weights {run} model     # a folder that transformers and vLLM load",
    ]


def _best_command(state: TrainState, path: Path) -> Iterator[str]:
    """How to take out the weights of the best evaluation, where those are not the last."""
    if state.best is None or state.best_step in (0, state.step):
        return
    folder = f"{path}/checkpoints/{state.best_step:08d}"
    if not Path(folder).is_dir():  # record.keep_best is off
        return
    yield (
        f"  gruppo export weights {shlex.quote(str(path))} best --step {state.best_step}  # the "
        f"best evaluation, {state.best:.3f}"
    )
