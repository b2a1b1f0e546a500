"""Aggregation weights on random masks: sums, coincidences of modes, exact split invariance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gruppo.objective.weights import (
    Constant,
    LocalTokenMean,
    PromptMean,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    TokenMean,
    Totals,
    Weights,
    count_groups,
)

MODES = [TokenMean(), SeqMeanTokenMean(), SeqMeanTokenSum(), Constant(length=7), PromptMean()]
Rows = tuple[torch.Tensor, torch.Tensor]


@st.composite
def steps(draw: st.DrawFn) -> Rows:
    """Mask [B, T] and group ids of 1 to 8 rows; rows may be empty."""
    rows, width = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    bits = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    group = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    return torch.tensor(bits).reshape(rows, width), torch.tensor(group)


@pytest.mark.parametrize("mode", MODES, ids=repr)
@given(step=steps(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_split_equals_the_slices_of_the_whole(
    mode: Weights, step: Rows, data: st.DataObject
) -> None:
    mask, group = step
    totals = Totals.of(mask, group)
    whole = mode(mask, group, totals)
    order = data.draw(st.permutations(range(len(group))))
    cut = data.draw(st.integers(0, len(group)))
    for rows in (order[:cut], order[cut:]):
        index = torch.tensor(rows, dtype=torch.int64)
        part = mode(mask[index], group[index], totals)
        assert torch.equal(part, whole[index])


@given(step=steps(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_counts_of_ranks_add_up(step: Rows, data: st.DataObject) -> None:
    mask, group = step
    cut = data.draw(st.integers(0, len(group)))
    parts = [count_groups(mask[s], group[s], 4) for s in (slice(None, cut), slice(cut, None))]
    summed, local = Totals.from_counts(parts[0] + parts[1]), Totals.of(mask, group)
    assert (summed.tokens, summed.rows) == (int(mask.sum()), len(group))
    assert summed.prompts == local.prompts == len(set(group.tolist()))
    tokens = [int(mask[group == g].sum()) for g in range(4)]
    assert summed.group_tokens.tolist() == tokens
    assert local.group_tokens.tolist() == tokens[: int(group.max()) + 1]


@given(step=steps())
@settings(max_examples=50, deadline=None)
def test_sums(step: Rows) -> None:
    mask, group = step
    totals = Totals.of(mask, group)
    rows, tokens = len(group), int(mask.sum())
    filled = int(mask.any(1).sum())
    live_groups = len({g for g, any_ in zip(group.tolist(), mask.any(1), strict=True) if any_})
    expected = {
        "token_mean": 1.0 if tokens else 0.0,
        "seq_mean_token_mean": filled / rows,
        "seq_mean_token_sum": tokens / rows,
        "constant": tokens / (rows * 7),
        "prompt_mean": live_groups / len(set(group.tolist())),
        "local_token_mean": 1.0 if tokens else 0.0,
    }
    for mode in (*MODES, LocalTokenMean()):
        weights = mode(mask, group, totals)
        assert weights.sum().item() == pytest.approx(expected[mode.kind], abs=1e-12)
        assert weights[~mask].abs().sum().item() == 0.0
        assert weights.dtype == torch.float64


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), prompts=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_prompt_mean_is_token_mean_for_equal_counts(lengths: list[int], prompts: int) -> None:
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).repeat(prompts, 1)
    group = torch.arange(prompts).repeat_interleave(len(lengths))
    totals = Totals.of(mask, group)
    torch.testing.assert_close(
        PromptMean()(mask, group, totals), TokenMean()(mask, group, totals), rtol=0.0, atol=1e-15
    )


@given(rows=st.integers(1, 6), length=st.integers(1, 6), pad=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_sequence_mean_is_token_mean_for_equal_lengths(rows: int, length: int, pad: int) -> None:
    mask = (torch.arange(length + pad) < length).expand(rows, -1)
    group = torch.zeros(rows, dtype=torch.int64)
    totals = Totals.of(mask, group)
    expected = TokenMean()(mask, group, totals)
    for mode in (SeqMeanTokenMean(), Constant(length=length), PromptMean()):
        torch.testing.assert_close(mode(mask, group, totals), expected, rtol=0.0, atol=1e-15)


@given(half=st.lists(st.integers(0, 3), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_constant_with_the_mean_length_is_token_mean(half: list[int]) -> None:
    lengths = torch.tensor([*half, *(8 - h for h in half)])  # mean 4, whatever the halves
    mask = torch.arange(9) < lengths[:, None]
    group = torch.zeros(len(lengths), dtype=torch.int64)
    totals = Totals.of(mask, group)
    torch.testing.assert_close(
        Constant(length=4)(mask, group, totals),
        TokenMean()(mask, group, totals),
        rtol=0.0,
        atol=1e-15,
    )


@pytest.mark.parametrize("mode", [*MODES, LocalTokenMean()], ids=repr)
@given(step=steps(), pad=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_padding_width_does_not_matter(mode: Weights, step: Rows, pad: int) -> None:
    mask, group = step
    wide = torch.nn.functional.pad(mask, (0, pad))
    expected = mode(mask, group, Totals.of(mask, group))
    actual = mode(wide, group, Totals.of(wide, group))
    assert torch.equal(actual[:, : mask.shape[1]], expected)
    assert actual[:, mask.shape[1] :].abs().sum().item() == 0.0


@pytest.mark.parametrize("mode", [*MODES, LocalTokenMean()], ids=repr)
@pytest.mark.parametrize("shape", [(3, 4), (3, 0), (0, 4)], ids=str)
def test_nothing_to_train_weighs_nothing(mode: Weights, shape: tuple[int, int]) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    group = torch.zeros(shape[0], dtype=torch.int64)
    weights = mode(mask, group, Totals.of(mask, group))
    assert torch.equal(weights, torch.zeros(shape, dtype=torch.float64))
