"""Dumps a step whose numbers were not finite, so that it can be replayed and understood."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gruppo.policy.checkpoint import write_json, write_tensors
from gruppo.policy.files import naming
from gruppo.record.codec import finite
from gruppo.record.run import RunDirectory
from gruppo.record.scrub import scrub_values


def replay_command(run: RunDirectory, step: int) -> str:
    """The command line that runs a dumped step again from the checkpoint before it."""
    path = run.path.absolute()
    home = Path.home()
    if path.is_relative_to(home):  # the home folder's name is not recorded
        where = f"~/{shlex.quote(str(path.relative_to(home)))}"
    else:
        where = shlex.quote(str(path))
    return f"gruppo resume {where} --replay {step}"


def dump_step(
    run: RunDirectory, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, object]
) -> Path:
    """Write a step's tensors and facts to ``dumps/<step>/``, replacing an earlier dump of it.

    Args:
        run: The open run.
        step: The step that was refused.
        tensors: What it was computed from (token ids, masks, advantages, log-probabilities).
        info: Facts as JSON values. Numbers that are not finite are written as the texts "nan",
            "inf" and "-inf", because JSON has no name for them.

    Returns:
        The folder: tensors.safetensors, info.json, replay.txt (the command that replays it).

    Raises:
        OSError: It could not be written; the path is named.
    """
    final = run.dumps / f"{step:08d}"
    temporary = run.dumps / f".tmp-{step:08d}"
    with naming(final):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_tensors(temporary / "tensors.safetensors", tensors)
        write_json(temporary / "info.json", finite(scrub_values({**info, "step": step})))
        (temporary / "replay.txt").write_text(replay_command(run, step) + "\n")
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
    return final
