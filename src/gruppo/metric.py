"""Typed metrics that add up: over micro-batches, over optimizer steps, over ranks.

A metric is kept as what it takes to combine it (a mean is a sum and a weight) and becomes a
float once, when it is logged. Averaging already averaged floats is what this module is against.

Example:
    >>> reduce(merge({"len": Mean(10.0, 2)}, {"len": Mean(2.0, 1)}))
    {'len': 4.0}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean, as the weighted sum and the weight. No weight gives NaN."""

    total: float
    weight: float

    def join(self, other: Mean) -> Mean:
        """Return the mean over both."""
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        """The mean."""
        return self.total / self.weight if self.weight else math.nan


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum."""

    value: float

    def join(self, other: Sum) -> Sum:
        """Return the sum of both."""
        return Sum(self.value + other.value)


@dataclass(frozen=True, slots=True)
class Max:
    """A maximum."""

    value: float

    def join(self, other: Max) -> Max:
        """Return the larger of both."""
        return Max(max(self.value, other.value))


@dataclass(frozen=True, slots=True)
class Min:
    """A minimum."""

    value: float

    def join(self, other: Min) -> Min:
        """Return the smaller of both."""
        return Min(min(self.value, other.value))


@dataclass(frozen=True, slots=True)
class Correlation:
    """Pearson's correlation of pairs (x, y), as their number and the sums of products.

    ``x``, ``y``, ``xx``, ``yy`` and ``xy`` are sums over the pairs. NaN where x or y is constant.
    """

    count: int
    x: float
    y: float
    xx: float
    yy: float
    xy: float

    def join(self, other: Correlation) -> Correlation:
        """Return the correlation over the pairs of both."""
        return Correlation(
            self.count + other.count,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.yy + other.yy,
            self.xy + other.xy,
        )

    @property
    def value(self) -> float:
        """The correlation, in [-1, 1]."""
        n = self.count
        spread = (n * self.xx - self.x**2) * (n * self.yy - self.y**2)
        if spread <= 0:
            return math.nan
        return max(-1.0, min(1.0, (n * self.xy - self.x * self.y) / math.sqrt(spread)))


Metric = Mean | Sum | Max | Min | Correlation


def merge(first: Mapping[str, Metric], second: Mapping[str, Metric]) -> dict[str, Metric]:
    """Combine two sets of metrics; a name in both must be of one kind."""
    merged = dict(first)
    for name, metric in second.items():
        merged[name] = _join(name, merged[name], metric) if name in merged else metric
    return merged


def _join(name: str, first: Metric, second: Metric) -> Metric:
    match first, second:
        case (
            (Mean(), Mean())
            | (Sum(), Sum())
            | (Max(), Max())
            | (Min(), Min())
            | (Correlation(), Correlation())
        ):
            return first.join(second)  # pyrefly: ignore[bad-argument-type]
        case _:
            raise TypeError(
                f"metric {name!r} is a {type(first).__name__} and a {type(second).__name__}"
            )


def reduce(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Turn every metric into the float that is logged."""
    return {name: metric.value for name, metric in metrics.items()}


def mean_over(values: Float[Tensor, "..."], where: Bool[Tensor, "..."]) -> Mean:
    """Mean of ``values`` where ``where`` is True, accumulated in float64."""
    chosen = values.detach()[where].double()
    return Mean(float(chosen.sum()), chosen.numel())


def extremes(values: Float[Tensor, "..."], where: Bool[Tensor, "..."]) -> tuple[Min, Max]:
    """Smallest and largest of ``values`` where ``where`` is True (±inf if nowhere)."""
    chosen = values.detach()[where]
    if not chosen.numel():
        return Min(math.inf), Max(-math.inf)
    low, high = torch.aminmax(chosen.double())
    return Min(float(low)), Max(float(high))


def correlation_over(
    x: Float[Tensor, "..."], y: Float[Tensor, "..."], where: Bool[Tensor, "..."]
) -> Correlation:
    """Correlation of ``x`` and ``y`` over the entries where ``where`` is True, in float64.

    >>> yes = torch.tensor([True, True, True, False])
    >>> x, y = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([6.0, 4.0, 2.0, 9.0])
    >>> correlation_over(x, y, yes).value
    -1.0
    """
    x, y = x.detach()[where].double(), y.detach()[where].double()
    sums = (x, y, x * x, y * y, x * y)
    return Correlation(x.numel(), *(float(values.sum()) for values in sums))
