"""Command lines of a small run on the tiny model, and such a run cut short."""

import shutil
from pathlib import Path

from gruppo.policy import checkpoint

SETTINGS = {
    "train.steps": "4",
    "rollout.prompts_per_step": "2",
    "rollout.group_size": "2",
    "rollout.max_tokens": "6",
    "data.held_out": "3",
    "data.train.0.size": "60",
    "optim.lr": "1e-3",
    "record.save_every": "2",
    "record.keep_last": "9",
    # random text differs in it, so there is a gradient
    "reward.parts.answer": '{name = "answer", kind = "regex", pattern = "[a-m]"}',
}


def arguments(model: Path, name: str, **changes: str) -> list[str]:
    """What follows ``train quickstart`` for a run called ``name``."""
    settings = SETTINGS | {"model.name": str(model), "record.name": name} | changes
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def cut_after(run: Path, step: int, to: Path) -> Path:
    """A copy of ``run`` whose newest checkpoint is that of ``step`` (0: there is none)."""
    shutil.copytree(run, to)
    for number in checkpoint.steps(to / "checkpoints"):
        if number > step:
            shutil.rmtree(to / "checkpoints" / f"{number:08d}")
    return to
