"""TensorBoard, Weights & Biases and trackio as callbacks.

Each is a frozen record that a recipe names; `start` imports the library (an extra) and returns a
`Tracker`. The run's id there is kept in the run folder, so a resumed run goes on in the same
curve. Only metrics are sent: no prompts, completions, recipes, code or environment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import ClassVar, Literal

from gruppo.record.run import RunDirectory
from gruppo.types import Group

Kind = Literal["tensorboard", "wandb", "trackio"]


class Tracker:
    """A callback that sends metrics somewhere; ``evaluated`` listens. Close it at the end.

    Made of two functions: ``log(step, metrics)`` and ``finish()``.
    """

    def __init__(
        self, log: Callable[[int, dict[str, float]], None], finish: Callable[[], None]
    ) -> None:
        self._log = log
        self._finish = finish

    def __call__(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Send the finite metrics of a finished step."""
        # No dashboard draws a NaN, and some refuse it; run.sqlite keeps it.
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._log(step, finite)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the finite metrics of an evaluation, as ``eval/NAME``."""
        self(step, (), {f"eval/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        """Send what is left."""
        self._finish()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBoard:
    """Event files in ``<run>/tensorboard``: ``tensorboard --logdir runs`` shows them."""

    kind: Literal["tensorboard"] = "tensorboard"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def start(self, run: RunDirectory, *, redone_from: int | None = None) -> Tracker:
        """Open the event files.

        Args:
            run: The run.
            redone_from: In a resumed run, the first step that is told again (0: the evaluation
                before training); what an earlier life drew from there on is hidden.

        Raises:
            ImportError: tensorboard is not installed.
        """
        folder = str(run.path / "tensorboard")
        writer = client_of(self.kind).SummaryWriter(folder, purge_step=redone_from)

        def log(step: int, metrics: dict[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return Tracker(log, writer.close)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wandb:
    """Weights & Biases: the run goes to ``project`` of ``entity`` (a user or team; None: your own).

    ``mode = "offline"`` keeps the files in the run folder for a later sync.

    The x axis of every chart is the metric "step": after a resume, steps that are run again are
    drawn over the old ones, where W&B's own counter would refuse them.
    """

    kind: Literal["wandb"] = "wandb"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    project: str = "gruppo"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"

    def start(self, run: RunDirectory, *, redone_from: int | None = None) -> Tracker:
        """Start the run, or go on with it.

        Raises:
            ImportError: wandb is not installed.
        """
        wandb = client_of(self.kind)
        session = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            name=run.name,
            id=run.tracker_id(self.kind),
            resume="allow",
            dir=str(run.path),
            save_code=False,
            settings=wandb.Settings(
                disable_git=True, disable_code=True, console="off", x_disable_machine_info=True
            ),
        )
        session.define_metric("step")
        session.define_metric("*", step_metric="step")

        def log(step: int, metrics: dict[str, float]) -> None:
            session.log({**metrics, "step": step})

        return Tracker(log, session.finish)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trackio:
    """trackio: a local dashboard (``trackio show``) of ``project``, or a Hugging Face ``space``."""

    kind: Literal["trackio"] = "trackio"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    project: str = "gruppo"
    space: str | None = None

    def start(self, run: RunDirectory, *, redone_from: int | None = None) -> Tracker:
        """Start the run, or go on with it (trackio knows runs by name: the id is part of it).

        Raises:
            ImportError: trackio is not installed.
        """
        trackio = client_of(self.kind)
        session = trackio.init(
            project=self.project,
            name=f"{run.name}-{run.tracker_id(self.kind)}",
            space_id=self.space,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

        def log(step: int, metrics: dict[str, float]) -> None:
            session.log(metrics, step=step)

        return Tracker(log, trackio.finish)


def client_of(kind: Kind) -> ModuleType:
    """Import what a tracker of this kind needs.

    Raises:
        ImportError: It is not installed; the text says how to.
    """
    try:
        return import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
    except ImportError as error:
        text = f'tracker {kind}: it is not installed; pip install "gruppo[{kind}]"'
        raise ImportError(text) from error
