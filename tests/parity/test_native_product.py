"""Products by panels equal torch's in float64, whatever the shapes, layouts and types."""

import pytest
import torch

from gruppo import native

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler")

# Rows, inner and columns: one of each, blocks that are not full, several panels, rows in several
# chunks, an inner dimension in several stretches.
SHAPES = [(1, 1, 1), (1, 2, 3), (7, 5, 50), (8, 64, 48), (13, 34, 97), (600, 6, 49), (9, 5001, 20)]
TYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not native.can_multiply(torch.bfloat16), reason="no bfloat16 products here"
        ),
    ),
]


def matrices(rows, inner, columns, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, inner, generator=generator)
    right = torch.randn(inner, columns, generator=generator)
    return left.to(dtype), right.to(dtype)


def close(found, left, right, plus=0.0):
    """Within what float32 sums of so many products may differ by."""
    expected = left.double() @ right.double() + plus
    scale = left.double().abs() @ right.double().abs() + 1
    assert float(((found.double() - expected).abs() / scale).max()) < 1e-6


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_of_both_matrices(shape, dtype):
    left, right = matrices(*shape, dtype)
    by_rows = native.cut_rows([right], dtype)
    by_columns = native.cut_columns([right.t().contiguous()], dtype)
    assert torch.equal(by_rows.data, by_columns.data)
    assert (by_rows.inner, by_rows.columns) == right.shape
    close(native.multiply(left, by_rows, dtype=torch.float32), left, right)
    transposed = left.t().contiguous().t()
    close(native.multiply(transposed, by_rows, dtype=torch.float32), left, right)


@pytest.mark.parametrize("dtype", TYPES)
def test_bias_totals_and_rows_that_lie_apart(dtype):
    left, right = matrices(11, 30, 70, dtype)
    panels, bias = native.cut_rows([right], dtype), torch.linspace(-1, 1, 70)
    close(native.multiply(left, panels, bias=bias, dtype=torch.float32), left, right, bias.double())
    wide = torch.randn(11, 50).to(dtype)
    close(native.multiply(wide[:, 12:42], panels, dtype=torch.float32), wide[:, 12:42], right)
    for view in (left, left.t().contiguous().t()):
        total = torch.full((11, 90), 2.0)
        out = native.multiply(view, panels, total=total[:, 10:80])
        close(out, left, right, 2.0)
        assert out.data_ptr() == total[:, 10:].data_ptr()
        assert torch.equal(total[:, :10], torch.full((11, 10), 2.0))
        assert torch.equal(total[:, 80:], torch.full((11, 10), 2.0))
    cross = native.multiply(left.t().contiguous().t(), panels, bias=bias, dtype=torch.float32)
    close(cross, left, right, bias.double())


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", TYPES)
def test_matrices_below_each_other_are_cast_on_the_way(dtype, source):
    """As torch casts them, to the bit; parts of odd height too."""
    whole = torch.randn(50, 33, generator=torch.Generator().manual_seed(1)).to(source)
    parts = [whole[:17], whole[17:18], whole[18:]]
    for cut in (native.cut_rows, native.cut_columns):
        assert torch.equal(cut(parts, dtype).data, cut([whole.to(dtype)], dtype).data)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_result_is_rounded_once(dtype):
    left, right = matrices(20, 100, 60, dtype)
    panels = native.cut_rows([right], dtype)
    wide = native.multiply(left, panels, dtype=torch.float32)
    assert torch.equal(native.multiply(left, panels), wide.to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_does_not_depend_on_its_company(dtype):
    left, right = matrices(67, 40, 100, dtype)
    panels = native.cut_rows([right], dtype)
    whole = native.multiply(left, panels)
    for first, last in ((0, 1), (3, 20), (60, 67)):
        assert torch.equal(native.multiply(left[first:last], panels), whole[first:last])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_nor_on_the_number_of_threads(threads):
    left, right = matrices(300, 70, 500, torch.float32)
    before = torch.get_num_threads()
    panels = native.cut_rows([right], torch.float32)
    expected = native.multiply(left, panels), native.multiply(left.t().contiguous().t(), panels)
    torch.set_num_threads(threads)
    try:
        found = native.multiply(left, panels), native.multiply(left.t().contiguous().t(), panels)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_nothing_times_something_is_nothing():
    left, right = torch.ones(3, 0), torch.ones(0, 4)
    panels = native.cut_rows([right], torch.float32)
    assert torch.equal(native.multiply(left, panels), torch.zeros(3, 4))
    assert torch.equal(native.multiply(left, panels, total=torch.ones(3, 4)), torch.ones(3, 4))
    assert torch.equal(native.multiply(left, panels, bias=torch.arange(4.0))[1], torch.arange(4.0))
    rows = native.cut_rows([torch.ones(2, 4)], torch.float32)
    assert native.multiply(torch.ones(0, 2), rows).shape == (0, 4)


@pytest.mark.parametrize("dtype", TYPES)
def test_not_a_number_stays_what_it_is_where_it_is(dtype):
    left, right = torch.ones(3, 3, dtype=dtype), torch.ones(3, 5, dtype=dtype)
    left[1, 2], right[0, 4] = float("nan"), float("inf")
    found = native.multiply(left, native.cut_rows([right], dtype)).float()
    expected = torch.full((3, 5), 3.0)
    expected[1], expected[0, 4], expected[2, 4] = float("nan"), float("inf"), float("inf")
    assert torch.equal(found.nan_to_num(-1, 9), expected.nan_to_num(-1, 9))


def test_what_does_not_fit_is_refused():
    panels = native.cut_rows([torch.ones(3, 4)], torch.float32)
    with pytest.raises(AssertionError, match="inner dimensions agree"):
        native.multiply(torch.ones(2, 4), panels)
    with pytest.raises(AssertionError, match="a bias a column"):
        native.multiply(torch.ones(2, 3), panels, bias=torch.ones(1))
    with pytest.raises(AssertionError, match="alike in width and type"):
        native.cut_rows([torch.ones(2, 3), torch.ones(2, 3).bfloat16()], torch.float32)
    with pytest.raises(AssertionError, match="one type of products"):
        native.multiply(torch.ones(2, 3, dtype=torch.bfloat16), panels)
    assert not native.can_multiply(torch.float64)
