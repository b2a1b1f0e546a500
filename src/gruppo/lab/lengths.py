"""Does the score follow the length? Pearson's correlation over completions.

On samples of the model it is evidence; on made completions, which were not made for it, a number
to look at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from gruppo.lab.examine import Examination, make_completion
from gruppo.lab.judge import Finding

Of = Literal["samples of the model", "made completions"]

_STRONG: Final = 0.8  # the health rule on rewards that leak length
_ENOUGH: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """``correlation`` of total and length in tokens over ``count`` completions (NaN: none)."""

    of: Of
    count: int
    correlation: float


def made_lengths(seen: Examination) -> Lengths:
    """Of everything that was made for the examination."""
    pairs = [
        (float(len(make_completion(trial.text).tokens)), score.total)
        for trial in seen.trials
        for score in trial.scores[:1]
        if score is not None and score.total is not None
    ]
    return correlate("made completions", pairs)


def correlate(of: Of, pairs: Sequence[tuple[float, float]]) -> Lengths:
    """Pearson's correlation of (length, total) pairs.

    >>> correlate("samples of the model", [(1.0, 0.0), (2.0, 0.5), (3.0, 1.0)]).correlation
    1.0
    """
    count = len(pairs)
    mean = [sum(pair[n] for pair in pairs) / count if count else 0.0 for n in (0, 1)]
    apart = [(x - mean[0], y - mean[1]) for x, y in pairs]
    scale = math.sqrt(sum(x * x for x, _ in apart) * sum(y * y for _, y in apart))
    value = sum(x * y for x, y in apart) / scale if scale > 0 else math.nan
    return Lengths(of=of, count=count, correlation=value)


def judge_lengths(lengths: Lengths) -> list[Finding]:
    """A warning if the model's samples score by their length."""
    if lengths.of != "samples of the model" or lengths.count < _ENOUGH:
        return []
    if not abs(lengths.correlation) > _STRONG:
        return []
    return [
        Finding(
            severity="warning",
            rule="length/samples",
            text=f"the total of {lengths.count} samples follows their length (correlation "
            f"{lengths.correlation:+.2f})",
            fix="lower the weight of length terms, and keep reward.shape_only_live = true",
        )
    ]
