"""What FlexAttention is told of packed groups: its masks, and its results without a compiler."""

from itertools import product

import pytest
import torch

from gruppo.model.attention import AttentionRule
from gruppo.model.flex import flex_attention, seen
from gruppo.model.packing import Packing, pack, packed_attention


def packed(prompts: list[int], counts: list[int]) -> Packing:
    """Neighbours of equal prompt length share it."""
    tokens = torch.zeros(len(counts), max(counts), dtype=torch.long)
    return pack([(1,) * n for n in prompts], tokens, counts)


def by_hand(prompts: list[int], counts: list[int], window: int | None) -> torch.Tensor:
    """What sees what, from (group, completion, position) of every token."""
    tokens: list[tuple[int, int, int]] = []
    for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        if row == 0 or prompt != prompts[row - 1]:
            group = row
            tokens += [(group, -1, at) for at in range(prompt)]
        tokens += [(group, row, prompt + at) for at in range(count - 1)]
    return torch.tensor(
        [
            [
                q[0] == k[0] and k[1] in (-1, q[1]) and 0 <= q[2] - k[2] < (window or 99)
                for k in tokens
            ]
            for q in tokens
        ]
    )


@pytest.mark.parametrize("window", [None, 1, 2])
def test_masks_of_all_small_layouts(window: int | None) -> None:
    for prompts in product((1, 2), repeat=3):
        for counts in product((1, 2, 3), repeat=3):
            packing = packed(list(prompts), list(counts))
            at = torch.arange(len(packing.ids))
            zero = torch.zeros((), dtype=torch.long)
            mask = seen(packing, window)(zero, zero, at[:, None], at[None])
            assert torch.equal(mask, by_hand(list(prompts), list(counts), window))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0), (3, 2.0)])
def test_results_are_those_of_calls_per_group(window: int | None, softcap: float | None) -> None:
    packing = packed([5, 5, 5, 2, 3, 3], [7, 1, 4, 3, 9, 2])
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, len(packing.ids), 8, generator=generator) for heads in (4, 2, 2)
    )
    rule = AttentionRule(0.4, window, softcap)
    expected = packed_attention(query, key, value, packing.groups, rule.attend, window=window)
    ours = flex_attention(
        query,
        key,
        value,
        packing,
        window=window,
        softcap=softcap,
        scaling=0.4,
        is_compiled=False,
    )
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5)
    assert list(packing.masks) == [window]  # made once
