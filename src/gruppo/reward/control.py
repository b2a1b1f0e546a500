"""A reward that knows nothing: the control that a real reward must beat.

If a model "improves" under it as well, the improvement is not learning from the reward
(arXiv:2506.10947).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from gruppo.types import Completion, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Random:
    """1 with probability ``chance``, else 0, whatever the completion says.

    The draw is a hash of ``seed``, the problem, the place in the group and the tokens, so that a
    resumed run draws the same.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["random"] = "random"
    chance: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.chance < 1:
            raise ValueError(f"chance = {self.chance}: must lie between 0 and 1")

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[float]:
        """Draw for ``completions``."""
        return [
            float(self._uniform(problem, row, completion) < self.chance)
            for row, completion in enumerate(completions)
        ]

    def _uniform(self, problem: Problem, row: int, completion: Completion) -> float:
        text = repr((self.seed, problem.source, problem.id, row, completion.tokens))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64
