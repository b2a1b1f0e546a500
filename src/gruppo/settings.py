"""How long to train, and how each rollout batch is used: settings that need no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSettings:
    """How a rollout batch is used.

    ``inner_epochs`` passes over it (μ), each cut into ``minibatches`` optimizer steps of whole
    groups. ``tokens_per_microbatch`` bounds prompt and completion tokens of one forward pass; it
    changes memory and speed, not results. ``skip_dead`` leaves rows that cannot contribute out of
    the passes (their tokens stay in the normalisers).
    """

    inner_epochs: int = 1
    minibatches: int = 1
    tokens_per_microbatch: int = 8192
    skip_dead: bool = True
    seed: int = 0

    @property
    def num_updates(self) -> int:
        """Optimizer steps per rollout batch."""
        return self.inner_epochs * self.minibatches


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How long to train, and how each rollout batch is used.

    ``inner_epochs`` (μ) and ``minibatches`` give the optimizer steps per rollout batch;
    ``tokens_per_microbatch`` bounds memory and changes no result. ``reference_sync_steps`` > 0
    moves the reference every so many steps by ``ref ← mixup·policy + (1 - mixup)·ref``
    (arXiv:2404.09656), with ``reference_mixup``. ``seed`` is behind every draw of the run.
    ``time_limit_s`` > 0 ends it that many seconds after the command began (in Python: when the run
    was opened), the last checkpoint and the last evaluation included; a resumed run counts anew.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    steps: int = 100
    inner_epochs: int = 1
    minibatches: int = 1
    tokens_per_microbatch: int = 8192
    seed: int = 0
    reference_sync_steps: int = 0
    reference_mixup: float = 1.0
    time_limit_s: float = 0.0

    def __post_init__(self) -> None:
        counts = {
            "steps": self.steps,
            "inner_epochs": self.inner_epochs,
            "minibatches": self.minibatches,
            "tokens_per_microbatch": self.tokens_per_microbatch,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} = {count}: must be at least 1")
        if self.reference_sync_steps < 0 or self.time_limit_s < 0:
            raise ValueError(
                f"reference_sync_steps = {self.reference_sync_steps}, time_limit_s = "
                f"{self.time_limit_s}: must not be negative; 0 is off"
            )
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}: must not be negative")
        if not 0 < self.reference_mixup <= 1:
            raise ValueError(f"reference_mixup = {self.reference_mixup}: must be in (0, 1]")

    @property
    def num_updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps * self.inner_epochs * self.minibatches

    def update(self, *, skip_dead: bool) -> UpdateSettings:
        """Return the part that ``update`` reads."""
        return UpdateSettings(
            inner_epochs=self.inner_epochs,
            minibatches=self.minibatches,
            tokens_per_microbatch=self.tokens_per_microbatch,
            skip_dead=skip_dead,
            seed=self.seed,
        )
