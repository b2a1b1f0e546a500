"""Small C++ kernels for the CPU, compiled once on the user's machine; optional everywhere.

Each has an equal in plain torch, which is used where no compiler is found.
"""

from gruppo.native.attention import can_attend, decode_attention
from gruppo.native.compiled import identity, kernels
from gruppo.native.decode import DecodeLayer, DecodeLayers, Kept, can_decode
from gruppo.native.layer import add_norm, rotate_and_keep, swiglu
from gruppo.native.product import (
    PanelProduct,
    Panels,
    can_multiply,
    cut_columns,
    cut_rows,
    multiply,
)
from gruppo.native.sampling import can_sample, sample
from gruppo.native.segments import (
    PartNumbers,
    Pattern,
    attend_parts,
    attend_parts_backward,
    can_attend_parts,
)
from gruppo.native.softmax import can_softmax, pick, pick_gradient_
from gruppo.native.training import (
    add_,
    can_add,
    join_heads,
    norm_backward,
    norm_forward,
    split_heads,
    swiglu_backward,
)

__all__ = [
    "DecodeLayer",
    "DecodeLayers",
    "Kept",
    "PanelProduct",
    "Panels",
    "PartNumbers",
    "Pattern",
    "add_",
    "add_norm",
    "attend_parts",
    "attend_parts_backward",
    "can_add",
    "can_attend",
    "can_attend_parts",
    "can_decode",
    "can_multiply",
    "can_sample",
    "can_softmax",
    "cut_columns",
    "cut_rows",
    "decode_attention",
    "identity",
    "join_heads",
    "kernels",
    "multiply",
    "norm_backward",
    "norm_forward",
    "pick",
    "pick_gradient_",
    "rotate_and_keep",
    "sample",
    "split_heads",
    "swiglu",
    "swiglu_backward",
]
