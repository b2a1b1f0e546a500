"""Attention merged of parts equals attention over all keys at once, in value and gradient."""

import pytest
import torch

from gruppo import native
from gruppo.model.attention import AttentionRule
from gruppo.model.packing import pack, packed_attention
from gruppo.model.rectangle import Part
from gruppo.model.segments import can_merge, merged_attention

PROMPTS = [(1, 2, 3, 4, 5)] * 3 + [(6,)] * 2 + [(7, 8)]
COUNTS = [6, 1, 4, 3, 0, 1]


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 3e-2)]
)
def test_merged_equals_gathered(dtype, bound, scaling):
    """Groups of ragged completions, empty ones too; 6 query heads on 2 key heads."""
    torch.manual_seed(0)
    packing = pack(PROMPTS, torch.zeros(6, 6, dtype=torch.long), COUNTS)
    total = len(packing.ids)
    query, key, value = (
        torch.randn(1, total, heads, 16, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (6, 2, 2)
    )
    weights = torch.randn(1, total, 6, 16, dtype=dtype)
    rule = AttentionRule(scaling=scaling)
    found = []
    for out in (
        merged_attention(query, key, value, packing.parts, scaling=scaling),
        packed_attention(query, key, value, packing.groups, rule.attend),
    ):
        found.append(
            [out.detach(), *torch.autograd.grad((out * weights).sum(), [query, key, value])]
        )
    for mine, other in zip(*found, strict=True):
        assert (mine - other).abs().max() <= bound * max(1.0, float(other.abs().max()))


@pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler here")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_own_kernels_equal_torchs(monkeypatch, dtype, bound):
    """Both ways round as the other does, so bfloat16 is close too."""
    torch.manual_seed(0)
    packing = pack(PROMPTS, torch.zeros(6, 6, dtype=torch.long), COUNTS)
    total = len(packing.ids)
    inputs = [
        torch.randn(1, total, heads, 16, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (6, 2, 2)
    ]
    weights = torch.randn(1, total, 6, 16, dtype=dtype)

    def outcome():
        out = merged_attention(*inputs, packing.parts)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]

    own = outcome()
    monkeypatch.setattr(native, "can_attend_parts", lambda query: False)
    for mine, flash in zip(own, outcome(), strict=True):
        assert (mine - flash).abs().max() <= bound * max(1.0, float(flash.abs().max()))


def test_parts_of_two_groups():
    """Prompts of 2 and 1 tokens; the last token of a completion is not read."""
    packing = pack([(1, 2), (1, 2), (3,), (3,)], torch.zeros(4, 4, dtype=torch.long), [4, 2, 1, 0])
    assert packing.parts == (
        Part(slice(0, 2), slice(0, 2), causal=True),
        Part(slice(2, 5), slice(2, 5), causal=True),
        Part(slice(5, 6), slice(5, 6), causal=True),
        Part(slice(2, 6), slice(0, 2), causal=False),
        Part(slice(6, 7), slice(6, 7), causal=True),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_empty_prompt_of_empty_completions_has_no_part(dtype):
    packing = pack([(), (1, 2)], torch.zeros(2, 3, dtype=torch.long), [0, 3])
    assert [part.query for part in packing.parts] == [slice(0, 2), slice(2, 4), slice(2, 4)]
    query = torch.randn(1, 2, 4, 8, dtype=dtype)
    assert merged_attention(query, query, query, packing.parts).isfinite().all()


def test_a_backward_pass_within_autocast():
    query = torch.randn(1, 2, 3, 8, requires_grad=True)
    parts = [Part(slice(0, 3), slice(0, 3), causal=True)]
    found = []
    for half in (False, True):
        out = merged_attention(query, query, query, parts)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(torch.autograd.grad(out.sum(), query)[0])
    assert torch.equal(*found)


def test_values_of_another_width_are_not_merged():
    query, value = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)
    assert can_merge(query, query, query)
    assert not can_merge(query, query, value)
    assert not can_merge(query.mT.contiguous().mT, query, query)
