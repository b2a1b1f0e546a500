"""The reward functions of a task set of the ``verifiers`` library, run in worker processes.

They belong to data of kind ``verifiers``, which says what can be taken. See ``child_verifiers.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from gruppo.reward.adapters import ask, require_secrets, score_by
from gruppo.reward.base import GroupRows, ungraded
from gruppo.types import Completion, Problem
from gruppo.worker.process import Death, Pool, Setup, pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifiers:
    """What the task's own reward functions and judges give in sum, by their weights.

    They see the prompt, the completion's text and its number of tokens. A call that takes longer
    than ``timeout_s`` is killed; an exception leaves the completion unscored. ``workers`` > 1 lets
    several groups be scored side by side. Of the variables whose names say that they are secret
    the workers see those in ``secrets`` (a judge's key, say).

    Raises:
        ValueError: a timeout or number of workers that is not positive.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["verifiers"] = "verifiers"
    timeout_s: float = 60.0
    workers: int = 1
    secrets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.timeout_s > 0 and self.workers > 0):
            raise ValueError(
                f"verifiers.timeout_s = {self.timeout_s}, workers = {self.workers}: "
                "both must be positive"
            )

    def open(self) -> None:
        """Start a worker.

        Raises:
            ValueError: verifiers is missing, or a variable that ``secrets`` names is not set.
        """
        require_secrets(self.secrets, "reward kind verifiers")
        info = self._pool().start()
        if isinstance(info, Death):
            raise ValueError(f'reward kind verifiers: {info.text}; pip install "gruppo[verifiers]"')

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Any]:
        """Grade one group."""
        return self.score_batch([(problem, completions)])[0]

    def score_batch(self, groups: Sequence[GroupRows]) -> list[list[Any]]:
        """Grade all groups."""
        try:
            self.open()
        except ValueError as error:
            return [[ungraded("start", str(error))] * len(c) for _, c in groups]
        run = partial(ask, self._pool(), name="verifiers", timeout_s=self.timeout_s)
        return score_by("trl", groups, run)

    def close(self) -> None:
        """End the worker processes."""
        self._pool().close()

    def _pool(self) -> Pool:
        setup = Setup(handler="reward/child_verifiers.py", settings="{}", secrets=self.secrets)
        return pool(setup, self.workers)
