"""Products of matrices on the CPU, of which the right one is cut into panels before.

Cutting casts on the way, and takes matrices that lie apart as one: weights in float32 need no copy
in the products' type, and layers that read the same rows no joint one. Sums are in float32. Each
product has its equal in torch (``left @ right``), which is taken where there are no kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.native.compiled import TYPES, kernel, kernels


@dataclass(frozen=True, slots=True, eq=False)
class Panels:
    """A matrix [``inner``, ``columns``], laid out as the kernels read it."""

    data: Tensor
    inner: int
    columns: int


@dataclass(frozen=True, slots=True, eq=False)
class PanelProduct:
    """Multiplies rows by a matrix, and adds a bias (in float32).

    ``beside`` is a low-rank adapter: the rows times its two matrices are added, each of the three
    results rounded to the type of the rows.
    """

    panels: Panels
    bias: Float[Tensor, "O"] | None
    beside: tuple[Panels, Panels] | None = None

    def __call__(self, rows: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        """In the type of the rows, which is that of the panels."""
        made = multiply(rows, self.panels, bias=self.bias)
        if self.beside is None:
            return made
        down, up = self.beside
        return made.add_(multiply(multiply(rows, down), up))


@cache
def can_multiply(dtype: torch.dtype) -> bool:
    """Whether there are kernels for products in ``dtype``: for bfloat16 with AVX512-BF16 alone."""
    if dtype not in TYPES or kernels() is None:
        return False
    return dtype == torch.float32 or bool(kernel("multiplies_bfloat16", "", ctypes.c_int64)())


def cut_columns(matrices: Sequence[Float[Tensor, "_ I"]], dtype: torch.dtype) -> Panels:
    """The transpose of ``matrices`` below each other: a linear layer's weights, say.

    Only for what ``can_multiply``; matrices are float32 or bfloat16, contiguous, of one width.
    """
    return _cut("columns", matrices, dtype)


def cut_rows(matrices: Sequence[Float[Tensor, "_ O"]], dtype: torch.dtype) -> Panels:
    """``matrices`` below each other, as they are."""
    return _cut("rows", matrices, dtype)


def multiply(
    left: Float[Tensor, "N I"],
    right: Panels,
    *,
    bias: Float[Tensor, "O"] | None = None,
    dtype: torch.dtype | None = None,
    total: Float[Tensor, "N O"] | None = None,
) -> Float[Tensor, "N O"]:
    """``left @ right``, plus ``bias``.

    Args:
        left: in the type of the panels, its rows each in one piece; or the transpose of such a
            matrix, which is cut on the way.
        right: cut in the products' type.
        bias: in any type, added in float32.
        dtype: of the result: that of ``left`` (the default) or float32.
        total: in float32; the product is added to it, and it is returned.
    """
    rows, inner = left.shape
    apart, step = left.stride()
    assert inner == right.inner, "inner dimensions agree"
    assert left.dtype == right.data.dtype, "one type of products"
    assert bias is None or bias.shape == (right.columns,), "a bias a column"
    if not inner:
        empty = left.new_zeros(rows, right.columns, dtype=dtype) if total is None else total
        return empty if bias is None else empty.add_(bias)
    if rows > 1 and apart == 1 != step:
        return _multiply_transposed(left.t(), right, bias, dtype, total)
    odd = inner % 2 if left.dtype == torch.bfloat16 else 0  # numbers are read in pairs then
    if step != 1 or odd:
        left = torch.nn.functional.pad(left, (0, odd)).contiguous()
        apart = left.stride(0)
    out = left.new_empty(rows, right.columns, dtype=dtype) if total is None else total
    assert total is None or _is_sum(total, rows, right)
    wide = None if bias is None else bias.float().contiguous()
    kernel(f"multiply_{TYPES[left.dtype]}_{TYPES[out.dtype]}", "iiiiiipppp")(
        *(rows, inner, right.columns, apart, out.stride(0), total is not None),
        *(left.data_ptr(), right.data.data_ptr()),
        *(None if wide is None else wide.data_ptr(), out.data_ptr()),
    )
    return out


def _is_sum(total: Tensor, rows: int, right: Panels) -> bool:
    is_wide = total.dtype == torch.float32
    return is_wide and total.stride(1) == 1 and total.shape == (rows, right.columns)


def _multiply_transposed(
    left: Float[Tensor, "I N"],
    right: Panels,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    total: Tensor | None,
) -> Float[Tensor, "N O"]:
    inner, rows = left.shape
    out = left.new_empty(rows, right.columns, dtype=torch.float32) if total is None else total
    assert _is_sum(out, rows, right)
    kernel(f"multiply_transposed_{TYPES[left.dtype]}", "iiiiiippp", ctypes.c_int64)(
        *(inner, rows, right.columns, left.stride(0), out.stride(0), total is not None),
        *(left.data_ptr(), right.data.data_ptr(), out.data_ptr()),
    )
    if total is not None:
        assert bias is None, "a sum has none"
        return out
    out = out if bias is None else out.add_(bias)
    return out.to(dtype or left.dtype)


def _cut(way: str, matrices: Sequence[Tensor], dtype: torch.dtype) -> Panels:
    width, kind = matrices[0].shape[1], matrices[0].dtype
    plain = [matrix.detach() for matrix in matrices]
    lines = {matrix.stride(0) for matrix in plain}
    assert all(m.shape[1] == width and m.dtype == kind for m in plain), "alike in width and type"
    assert width == 1 or all(matrix.stride(1) == 1 for matrix in plain), "rows are whole"
    assert len(lines) == 1, "rows are as far apart in all"
    heights = [len(matrix) for matrix in plain]
    inner, columns = (width, sum(heights)) if way == "columns" else (sum(heights), width)
    count = kernel(f"panels_{TYPES[dtype]}", "ii", ctypes.c_int64)(inner, columns)
    data = plain[0].new_empty(count, dtype=dtype)
    kernel(f"cut_{way}_{TYPES[kind]}_{TYPES[dtype]}", "ippiip", ctypes.c_int64)(
        len(plain),
        (ctypes.c_void_p * len(plain))(*(matrix.data_ptr() for matrix in plain)),
        (ctypes.c_int64 * len(plain))(*heights),
        *(lines.pop(), width, data.data_ptr()),
    )
    return Panels(data, inner, columns)
