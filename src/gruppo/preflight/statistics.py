"""Intervals from a few groups: pass rates, truncation, and how many groups would be dead.

Completions of one problem are alike, so the problem is the unit. Every mean over problems has a
95 % interval by the Bayesian bootstrap (Rubin 1981) with half a problem of value 0 and half a one
of value 1 added, so that ten dead groups of ten do not pass for certainty; for values of 0 and 1
alone that is the interval of Jeffreys, Beta(x + 1/2, n - x + 1/2). Nothing here samples a model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

_DRAWS: Final = 8000
_TAIL: Final = 0.025
_DIGITS: Final = 6  # rewards that differ by less agree (types.ZERO_TOL)
_MEANS, _SPREADS = 120, 60  # cells of the grid over the Beta distribution of pass rates
_LEAST_SPREAD, _MOST_SPREAD = 0.02, 500.0


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval."""

    low: float
    value: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def text(self, digits: int = 0) -> str:
        """In per cent.

        >>> Interval(0.05, 0.125, 0.3).text()
        '12 % (5 to 30)'
        """
        low, value, high = (f"{100 * x:.{digits}f}" for x in (self.low, self.value, self.high))
        return f"{value} % ({low} to {high})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dead:
    """Share of dead groups with ``group`` completions each.

    "counted": over the subsets of the completions that were drawn; "modelled": more were never
    drawn, so pass rates are taken to be Beta distributed.
    """

    group: int
    share: Interval
    method: Literal["counted", "modelled"]


def mean_interval(
    values: Sequence[float], *, future: int | None = None, binary: bool = False, seed: int = 0
) -> Interval:
    """Mean of values in [0, 1], one a problem, with its interval.

    Args:
        values: of the problems that were tried.
        future: None asks for the mean over all problems there could be; a number for what the mean
            over so many more of them will turn out to be.
        binary: those are 0 or 1, and ``values`` are their chances to be 1.
        seed: of the draws.

    Raises:
        ValueError: no values, or some outside of [0, 1].
    """
    if not values or min(values) < 0 or max(values) > 1:
        raise ValueError("mean_interval needs values between 0 and 1, at least one")
    draw = np.random.default_rng(seed)
    weights = draw.dirichlet([1.0] * len(values) + [0.5, 0.5], size=_DRAWS)
    all_values = np.array([*values, 0.0, 1.0])
    means = weights @ all_values
    if future is not None:
        squares = means if binary else weights @ all_values**2
        spread = np.sqrt(np.maximum(squares - means**2, 0.0) / future)
        means = np.clip(means + spread * draw.standard_normal(_DRAWS), 0.0, 1.0)
    low, high = np.quantile(means, [_TAIL, 1 - _TAIL])
    value = fmean(values)
    return Interval(min(float(low), value), value, max(float(high), value))


def wilson(hits: int, count: int) -> Interval:
    """Share of independent hits with Wilson's interval (1927).

    >>> wilson(0, 10).text(), wilson(5, 10).text()
    ('0 % (0 to 28)', '50 % (24 to 76)')
    """
    z = 1.959964
    share, width = hits / count, z * z / count
    middle = (share + width / 2) / (1 + width)
    half = z / (1 + width) * math.sqrt(share * (1 - share) / count + width / count / 4)
    return Interval(max(0.0, middle - half), share, min(1.0, middle + half))


def agreement(values: Sequence[float], group: int) -> float:
    """Chance that ``group`` of these values, drawn without replacement, are all equal.

    The unbiased estimate of the sum over values v of P(v)^group (Hoeffding's U-statistic).

    >>> agreement([1, 1, 0, 0], 2), agreement([1, 1, 1, 0], 4)
    (0.3333333333333333, 0.0)
    """
    counts = Counter(round(value, _DIGITS) for value in values).values()
    return sum(math.comb(count, group) for count in counts) / math.comb(len(values), group)


def dead_share(
    rows: Sequence[Sequence[float]], group: int, *, future: int | None = None
) -> Dead | None:
    """Share of dead groups of ``group`` completions, from the task rewards of some groups.

    Args:
        rows: task rewards of the scored completions of each problem.
        group: completions a group would have.
        future: as in :func:`mean_interval`, where the share is counted.

    Returns:
        None where that is more than were drawn, and the rewards are not just two values.
    """
    enough = [values for values in rows if len(values) >= group]
    if enough and 2 * len(enough) >= len(rows):
        chances = [agreement(values, group) for values in enough]
        share = mean_interval(chances, future=future, binary=True)
        return Dead(group=group, share=share, method="counted")
    kinds = {round(value, _DIGITS) for values in rows for value in values}
    if len(kinds) > 2 or not kinds:
        return None
    best = max(kinds) if len(kinds) == 2 else min(kinds | {0.0})
    hits = [sum(round(v, _DIGITS) == best for v in values) for values in rows]
    if len(kinds) == 1 and kinds != {0.0}:
        hits = [len(values) for values in rows]
    return Dead(
        group=group, share=_modelled(hits, [len(v) for v in rows], group), method="modelled"
    )


def _modelled(hits: Sequence[int], counts: Sequence[int], group: int) -> Interval:
    """Posterior of E[p^G + (1-p)^G] for p ~ Beta(a, b), from passes ~ Binomial(count, p).

    A grid over the mean of the Beta (Jeffreys' prior) and the logarithm of a + b (flat).
    """
    angle = (torch.arange(_MEANS, dtype=torch.float64) + 0.5) / _MEANS * math.pi / 2
    mean = angle.sin() ** 2  # equal steps of the angle are equal mass under Jeffreys' prior
    size = torch.logspace(
        math.log10(_LEAST_SPREAD), math.log10(_MOST_SPREAD), _SPREADS, dtype=torch.float64
    )
    a, b = mean[:, None] * size, (1 - mean)[:, None] * size
    score = torch.zeros_like(a)
    for (hit, count), times in Counter(zip(hits, counts, strict=True)).items():
        score += times * (_log_beta(a + hit, b + count - hit) - _log_beta(a, b))
    weight = (score - score.max()).exp().flatten()
    full = torch.full_like(a, float(group))
    dead = (_log_beta(a + full, b) - _log_beta(a, b)).exp()
    dead = (dead + (_log_beta(a, b + full) - _log_beta(a, b)).exp()).flatten()
    return _weighted(dead.clamp(max=1.0), weight / weight.sum())


def beta_agreement(a: float, b: float, group: int) -> float:
    """E[p^G + (1-p)^G] for p ~ Beta(a, b), exactly.

    >>> round(beta_agreement(1.0, 1.0, 4), 6)
    0.4
    """
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    both = (_log_beta(x + group, y), _log_beta(x, y + group))
    return float(sum((value - _log_beta(x, y)).exp() for value in both))


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _weighted(values: Tensor, weight: Tensor) -> Interval:
    order = values.argsort()
    summed = weight[order].cumsum(0)
    ends = torch.searchsorted(summed, torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64))
    low, high = values[order][ends.clamp(max=len(values) - 1)].tolist()
    return Interval(low, float((values * weight).sum()), high)
