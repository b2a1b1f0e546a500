"""Which products of matrices (``products.py``) are the fastest: timed once per machine, and kept.

It only answers. Results differ by rounding, hence a run records its choice and keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from gruppo import native
from gruppo.measured import fastest, remembered
from gruppo.model.gradient import add
from gruppo.model.products import MULTIPLY, Products, can_choose, has_blocks

# A transformer's projections in a micro-batch; 3.6 GFLOP a product.
_ROWS, _INNER, _COLUMNS = 2048, 576, 1536
_REPEATS = 3
_FEW = 64  # rows of a decode step
_ONEDNN_WORTHWHILE = 1.15


def faster_products(device: torch.device | str, compute: torch.dtype) -> Products:
    """The fastest products in ``compute`` on ``device``: "torch" unless measured else.

    The products of drawing, of a forward and of a backward pass are timed, the best of several runs
    counting; oneDNN, which is asked for float32 alone, must gain 15 %. Timed once per machine
    (about a second) and kept, and only on a CPU.

    >>> faster_products("cpu", torch.float64)
    'torch'
    """
    kinds = ["torch", *(kind for kind in ("onednn", "native") if can_choose(kind, compute))]
    if torch.device(device).type != "cpu" or len(kinds) == 1:
        return "torch"
    return _measured(compute, tuple(kinds))


@cache
def _measured(compute: torch.dtype, kinds: tuple[Products, ...]) -> Products:
    found = remembered(
        "products-of-a-step",
        kinds,
        lambda: _compared(compute, kinds),
        depends_on=(
            *(torch.__version__, str(torch.get_num_threads()), str(compute)),
            *(*kinds, native.identity()),
        ),
    )
    return next(kind for kind in kinds if kind == found)


def _compared(compute: torch.dtype, kinds: Sequence[Products]) -> Products:
    seconds = dict(
        zip(kinds, fastest([_work(kind, compute) for kind in kinds], repeats=_REPEATS), strict=True)
    )
    costs: dict[Products, float] = {
        "torch": seconds["torch"],
        "onednn": seconds.get("onednn", float("inf")) * _ONEDNN_WORTHWHILE,
        "native": seconds.get("native", float("inf")),
    }
    return min(kinds, key=lambda kind: costs[kind])


def _work(kind: Products, compute: torch.dtype) -> Callable[[], object]:
    """A matrix's part in a step, as training and the engine do it, from its float32 weight.

    Every token is drawn once, a few rows at a time by a matrix that was packed before and has left
    the caches since, and goes forward and backward once.
    """
    rows = torch.ones(_ROWS, _INNER, dtype=compute)
    grad = torch.ones(_ROWS, _COLUMNS, dtype=compute)
    weight, total = torch.ones(_COLUMNS, _INNER), torch.zeros(_COLUMNS, _INNER)
    few, turns = rows[:_FEW], range(_ROWS // _FEW)
    if kind == "native":
        packed = [native.cut_columns([weight], compute) for _ in turns]

        def own() -> None:
            native.multiply(rows, native.cut_columns([weight], compute))
            native.multiply(grad, native.cut_rows([weight], compute))
            native.multiply(grad.t(), native.cut_rows([rows], compute), total=total)
            for panels in packed:
                native.multiply(few, panels)

        return own
    cast, multiply = weight.to(compute), MULTIPLY[kind]
    pack = torch.ops.mkldnn._reorder_linear_weight if has_blocks(compute) else None
    blocks = [cast.clone() if pack is None else pack(cast, _FEW) for _ in turns]

    def theirs() -> None:
        multiply(rows, cast)
        multiply(grad, cast.t())
        add(total, multiply(grad.t(), rows.t()))
        for block in blocks:
            multiply(few, block) if pack is None else MULTIPLY["onednn"](few, block)

    return theirs
