"""The kernels of attention over parts of a row equal masked attention in float64."""

import pytest
import torch
from torch import Tensor

from gruppo import native

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler here")
KINDS = [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)]
SCALE = 0.3

# A prompt, two completions, and a turn that only the second goes on with; then a row of its own.
TREE = (
    *((0, 7, 0, 7, True), (7, 12, 7, 12, True), (12, 29, 12, 29, True)),
    *((29, 32, 29, 32, True), (32, 40, 32, 40, True)),
    *((7, 32, 0, 7, False), (29, 32, 12, 29, False)),
)
# More queries and keys than any block has, none of them whole.
LONG = ((0, 301, 0, 301, True), (301, 403, 301, 403, True), (301, 403, 0, 301, False))
# Queries 5 to 8 are a part of their own, though keys are shared.
PIECES = ((0, 5, 0, 5, True), (5, 9, 0, 9, True))
SHAPES = [
    (TREE, 40, 2, 3, 14),
    (TREE, 40, 1, 1, 64),
    (TREE, 40, 3, 2, 80),
    (LONG, 403, 1, 3, 16),
    (LONG, 403, 2, 1, 128),
    (LONG, 403, 2, 3, 18),
    (PIECES, 9, 2, 2, 6),
    (((0, 1, 0, 1, True),), 1, 1, 1, 2),
]


def close(mine: Tensor, other: Tensor, bound: float) -> bool:
    return bool((mine.double() - other.double()).abs().max() <= bound * other.abs().max().double())


def seen(parts: tuple[native.PartNumbers, ...], length: int) -> Tensor:
    """Whether a query (row) sees a key (column), position by position."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for first, end, first_key, end_key, causal in parts:
        for query in range(first, end):
            mask[query, first_key : query + 1 if causal else end_key] = True
    return mask


def drawn(length, heads, repeats, width, dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    query = torch.randn(heads, length, repeats, width).to(dtype)
    key, value = torch.randn(2, heads, length, width).to(dtype)
    grad = torch.randn(length, heads * repeats, width).to(dtype)
    return query, key, value, grad


def both_ways(query, key, value, grad, parts) -> tuple[Tensor, ...]:
    out = torch.full_like(grad, torch.nan)
    pattern = native.Pattern(parts, SCALE)
    lse = native.attend_parts(query, key, value, pattern, out=out)
    return (
        *(out, lse),
        *native.attend_parts_backward(query, key, value, pattern, out=out, lse=lse, grad=grad),
    )


@pytest.mark.parametrize(("parts", "length", "heads", "repeats", "width"), SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), KINDS)
def test_attention_and_its_gradient(dtype, bound, parts, length, heads, repeats, width):
    query, key, value, grad = drawn(length, heads, repeats, width, dtype)
    wide = [x.double().requires_grad_() for x in (query, key, value)]
    scores = torch.einsum("knrd,kmd->knrm", wide[0], wide[1]) * SCALE
    scores = scores.masked_fill(~seen(parts, length)[:, None], -torch.inf)
    mixed = torch.einsum("knrm,kmd->nkrd", scores.softmax(-1), wide[2]).flatten(1, 2)
    wanted = torch.autograd.grad((mixed * grad.double()).sum(), wide)
    out, lse, *gradients = both_ways(query, key, value, grad, parts)
    assert close(out, mixed.detach(), bound)
    assert close(lse, scores.detach().logsumexp(-1), 1e-6)
    assert [x.dtype for x in (out, lse, *gradients)] == [dtype] + [torch.float32] * 4
    for mine, other in zip(gradients, wanted, strict=True):
        if other.abs().max() > 1e-9:  # a query with one key: nothing depends on its score
            assert close(mine, other, bound)
        else:
            assert mine.abs().max() <= bound


@pytest.mark.parametrize(("dtype", "bound"), KINDS)
def test_large_scores_neither_overflow_nor_vanish(dtype, bound):
    """The keys of all parts have one largest score: here that of the first query's own key."""
    query = torch.zeros(1, 4, 1, 2, dtype=dtype)
    query[0, :, 0, 0] = 64.0
    key = torch.zeros(1, 4, 2, dtype=dtype)
    key[0, :, 0] = torch.tensor([32.0, -32.0, 16.0, 32.0])
    value = torch.arange(8.0).view(1, 4, 2).to(dtype)
    parts = ((0, 2, 0, 2, True), (2, 4, 2, 4, True), (2, 4, 0, 2, False))
    out = torch.empty(4, 1, 2, dtype=dtype)
    lse = native.attend_parts(query, key, value, native.Pattern(parts, 1.0), out=out)
    assert torch.allclose(lse[0, :, 0], torch.tensor([2048.0, 2048, 2048, 2048 + 0.693147]))
    wanted = torch.tensor([[0.0, 1], [0, 1], [0, 1], [3, 4]])  # the last: of keys 0 and 3
    assert torch.allclose(out[:, 0].float(), wanted, atol=bound)


def test_results_do_not_depend_on_the_number_of_threads():
    given = drawn(403, 2, 3, 16, torch.bfloat16)
    torch.set_num_threads(1)
    one = both_ways(*given, LONG)
    torch.set_num_threads(3)  # the fixture of all tests sets one again
    for mine, other in zip(one, both_ways(*given, LONG), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(("dtype", "_"), KINDS)
def test_positions_without_a_part_see_nothing(dtype, _):
    """Their output is 0 and so is what they add to gradients; of log-sum-exps, -inf is of none."""
    given = drawn(6, 1, 2, 4, dtype)
    out, lse, *gradients = both_ways(*given, ((1, 3, 1, 3, True),))
    rest = [0, 3, 4, 5]
    assert bool((out[rest] == 0).all() and (lse[0, rest] == -torch.inf).all())
    assert all(bool((x[0, rest] == 0).all()) for x in gradients)
    shifted = tuple(x[:, 1:3].contiguous() for x in given[:3]), given[3][1:3].contiguous()
    alone, *_ = both_ways(*shifted[0], shifted[1], ((0, 2, 0, 2, True),))
    assert torch.equal(out[1:3], alone)


@pytest.mark.parametrize(
    ("heads", "length", "repeats", "width"),
    [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)],
)
@pytest.mark.parametrize(("dtype", "_"), KINDS)
def test_nothing_to_attend(heads, length, repeats, width, dtype, _):
    given = drawn(length, heads, repeats, width, dtype)
    parts = ((0, length, 0, length, True),)
    out, lse, *gradients = both_ways(*given, parts)
    keys = heads * length * width  # where there are no queries, keys get gradients of 0
    assert [x.numel() for x in (out, *gradients)] == [0, 0, keys, keys]
    assert lse.shape == (heads, length, repeats)
    if width == 0:  # products of no numbers are 0: all keys weigh alike
        assert torch.allclose(lse[0, :, 0].exp(), torch.arange(1.0, length + 1))
    if repeats == 0:
        assert all(bool((x == 0).all()) for x in gradients)


def test_what_cannot_be_is_refused():
    given = drawn(6, 1, 1, 4, torch.float32)
    for parts in ([(0, 7, 0, 7, True)], [(0, 3, 0, 4, True)], [(0, 3, 1, 3, True)]):
        with pytest.raises(AssertionError):
            both_ways(*given, parts)
    whole = ((0, 6, 0, 6, True),)
    with pytest.raises(AssertionError, match="one type of numbers"):
        both_ways(*given[:3], given[3].bfloat16(), whole)
    with pytest.raises(AssertionError, match="read in pairs"):
        both_ways(*drawn(6, 1, 1, 3, torch.float32), whole)
