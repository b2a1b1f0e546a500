"""Language models: opening them, prompts, adapters, attention and log-probabilities."""

from gruppo.model.adapter import (
    Lora,
    attach,
    base_model,
    is_adapted,
    merged_weights,
    without_adapter,
)
from gruppo.model.logprob import Scored, can_pack, completion_logp
from gruppo.model.packaged import CATALOG, PackagedModel, cache_folder
from gruppo.model.precision import cast_frozen, compute_dtype, is_autocast
from gruppo.model.prompt import Encoder, end_ids
from gruppo.model.source import Loaded, load

__all__ = [
    "CATALOG",
    "Encoder",
    "Loaded",
    "Lora",
    "PackagedModel",
    "Scored",
    "attach",
    "base_model",
    "cache_folder",
    "can_pack",
    "cast_frozen",
    "completion_logp",
    "compute_dtype",
    "end_ids",
    "is_adapted",
    "is_autocast",
    "load",
    "merged_weights",
    "without_adapter",
]
