"""Wall-clock time of a run: how long its parts take, and whether another step fits the limit.

It reads one clock and ends nothing; the loop asks it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["step", "save", "evaluation"]


@dataclass(slots=True, kw_only=True)
class Budget:
    """Time since ``began``: when the command line was entered, or else when this was made.

    ``longest`` holds the longest step, save and evaluation so far, in seconds of ``clock``.
    """

    began: float = field(default_factory=time.monotonic)
    clock: Callable[[], float] = time.monotonic
    longest: dict[Kind, float] = field(default_factory=dict)

    @contextmanager
    def timing(self, kind: Kind) -> Iterator[None]:
        """Measure what is done inside (if it gets to its end)."""
        started = self.clock()
        yield
        self.longest[kind] = max(self.longest.get(kind, 0.0), self.clock() - started)

    def is_short(self, limit: float, *, evaluates: bool) -> bool:
        """Whether one more step, the last save and the last evaluation would overrun ``limit``.

        Each is taken to last as long as the longest so far. A save that was never made counts as
        a step: whoever is killed in it loses the run. An evaluation that was never made counts
        nothing: it comes after the save.

        Args:
            limit: Seconds; 0 is none.
            evaluates: Whether the run ends with an evaluation.

        Example:
            >>> budget = Budget(began=0.0, clock=lambda: 60.0, longest={"step": 10, "save": 5})
            >>> budget.is_short(75, evaluates=True), budget.is_short(74, evaluates=True)
            (False, True)
        """
        step = self.longest.get("step", 0.0)
        reserve = step + self.longest.get("save", step)
        if evaluates:
            reserve += self.longest.get("evaluation", 0.0)
        return limit > 0 and self.clock() - self.began + reserve > limit
