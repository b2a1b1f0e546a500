"""Language models: opening them, prompts, adapters, attention and log-probabilities.

Names are imported when they are first used: settings such as a recipe's records must not wait for
transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gruppo.model.activations import Activations
    from gruppo.model.adapter import (
        Lora,
        attach,
        base_model,
        is_adapted,
        merged_weights,
        save_adapter,
        without_adapter,
    )
    from gruppo.model.casts import Casts
    from gruppo.model.gradient import summing
    from gruppo.model.logprob import Scored, can_fuse, can_pack, completion_logp
    from gruppo.model.packaged import CATALOG, PackagedModel, cache_folder
    from gruppo.model.precision import cast_frozen, compute_dtype, is_autocast
    from gruppo.model.products import (
        Products,
        can_choose,
        choosing,
        multiplying,
    )
    from gruppo.model.prompt import Encoder, end_ids
    from gruppo.model.source import Loaded, load
    from gruppo.model.timed_products import faster_products

_HOMES = {
    "Activations": "gruppo.model.activations",
    "CATALOG": "gruppo.model.packaged",
    "Casts": "gruppo.model.casts",
    "Encoder": "gruppo.model.prompt",
    "Loaded": "gruppo.model.source",
    "Lora": "gruppo.model.adapter",
    "PackagedModel": "gruppo.model.packaged",
    "Products": "gruppo.model.products",
    "Scored": "gruppo.model.logprob",
    "attach": "gruppo.model.adapter",
    "base_model": "gruppo.model.adapter",
    "cache_folder": "gruppo.model.packaged",
    "can_choose": "gruppo.model.products",
    "can_fuse": "gruppo.model.logprob",
    "can_pack": "gruppo.model.logprob",
    "cast_frozen": "gruppo.model.precision",
    "choosing": "gruppo.model.products",
    "completion_logp": "gruppo.model.logprob",
    "compute_dtype": "gruppo.model.precision",
    "end_ids": "gruppo.model.prompt",
    "faster_products": "gruppo.model.timed_products",
    "is_adapted": "gruppo.model.adapter",
    "is_autocast": "gruppo.model.precision",
    "load": "gruppo.model.source",
    "merged_weights": "gruppo.model.adapter",
    "multiplying": "gruppo.model.products",
    "save_adapter": "gruppo.model.adapter",
    "summing": "gruppo.model.gradient",
    "without_adapter": "gruppo.model.adapter",
}

__all__ = [
    "CATALOG",
    "Activations",
    "Casts",
    "Encoder",
    "Loaded",
    "Lora",
    "PackagedModel",
    "Products",
    "Scored",
    "attach",
    "base_model",
    "cache_folder",
    "can_choose",
    "can_fuse",
    "can_pack",
    "cast_frozen",
    "choosing",
    "completion_logp",
    "compute_dtype",
    "end_ids",
    "faster_products",
    "is_adapted",
    "is_autocast",
    "load",
    "merged_weights",
    "multiplying",
    "save_adapter",
    "summing",
    "without_adapter",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(_HOMES[name]))[name]
