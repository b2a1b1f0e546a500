"""Typed metrics combine as what they are, never as averaged floats."""

import math

import pytest
import torch

from gruppo.metric import (
    Correlation,
    Max,
    Mean,
    Min,
    Sum,
    correlation_over,
    extremes,
    mean_over,
    merge,
    reduce,
)


def test_mean_of_parts_is_the_mean_of_the_whole():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    everywhere = torch.ones(5, dtype=torch.bool)
    parts = merge(
        {"x": mean_over(values[:2], everywhere[:2])}, {"x": mean_over(values[2:], everywhere[2:])}
    )
    assert reduce(parts) == {"x": 31.0 / 5}


def test_masked_garbage_does_not_reach_a_mean():
    values = torch.tensor([[1.0, math.nan], [3.0, math.inf]])
    where = torch.tensor([[True, False], [True, False]])
    assert mean_over(values, where) == Mean(4.0, 2)


def test_each_kind_joins_by_its_own_rule():
    first = {"a": Max(1.0), "b": Min(1.0), "c": Sum(1.0), "d": Mean(1.0, 1)}
    second = {"a": Max(2.0), "b": Min(0.5), "c": Sum(2.5), "d": Mean(5.0, 2), "e": Sum(7.0)}
    assert reduce(merge(first, second)) == {"a": 2.0, "b": 0.5, "c": 3.5, "d": 2.0, "e": 7.0}


def test_a_name_has_one_kind():
    with pytest.raises(TypeError, match="'a' is a Max and a Sum"):
        merge({"a": Max(1.0)}, {"a": Sum(1.0)})


def test_nothing_to_average_is_nan_and_nothing_to_compare_is_infinite():
    nowhere = torch.zeros(3, dtype=torch.bool)
    assert math.isnan(mean_over(torch.ones(3), nowhere).value)
    assert extremes(torch.ones(3), nowhere) == (Min(math.inf), Max(-math.inf))
    assert extremes(torch.tensor([3.0, -1.0, 9.0]), torch.tensor([True, True, False])) == (
        Min(-1.0),
        Max(3.0),
    )


def test_a_correlation_of_parts_is_that_of_the_whole():
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 40, generator=draw, dtype=torch.float64)
    y = 2 * x - noise
    where = torch.rand(40, generator=draw) < 0.7
    joined = merge(
        {"r": correlation_over(x[:13], y[:13], where[:13])},
        {"r": correlation_over(x[13:], y[13:], where[13:])},
    )
    expected = torch.corrcoef(torch.stack([x[where], y[where]]))[0, 1].item()
    assert reduce(joined)["r"] == pytest.approx(expected, abs=1e-12)
    assert 0.7 < expected < 1


@pytest.mark.parametrize("y", [[2.0, 2.0, 2.0], [1.0], []])
def test_what_does_not_vary_correlates_with_nothing(y):
    x = torch.arange(len(y), dtype=torch.float64)
    found = correlation_over(x, torch.tensor(y), torch.ones(len(y), dtype=torch.bool))
    assert found.count == len(y)
    assert math.isnan(found.value)


def test_equal_values_correlate_to_1_and_never_more():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    assert correlation_over(x, x, x > 0).value == pytest.approx(1.0, abs=1e-12)
    assert Correlation(2, 1.0, 1.0, 1.0, 1.0, 1.0 + 1e-9).value == 1.0
