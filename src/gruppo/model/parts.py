"""The parts of a Hugging Face causal model, with or without a PEFT adapter around it.

PEFT's wrapper forwards these calls to the model inside, whose layers hold the adapter. The only
place that says so to the type checker.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


def causal(model: nn.Module) -> Any:
    """The model as something that has the methods of a ``PreTrainedModel`` (or forwards them)."""
    return model


def embedding(model: nn.Module) -> Tensor:
    """Input embedding matrix, [V, D]."""
    return causal(model).get_input_embeddings().weight


def body(model: nn.Module) -> nn.Module:
    """What turns token ids into the hidden states that the head reads."""
    return causal(model).get_decoder()


def head(model: nn.Module) -> nn.Module:
    """The projection to the vocabulary."""
    return causal(model).get_output_embeddings()


def text_config(model: nn.Module) -> PreTrainedConfig:
    """Configuration of the language model (a multi-modal model has several)."""
    return causal(model).config.get_text_config(decoder=True)


def context_length(model: nn.Module) -> int | None:
    """Most tokens the model can read, prompt and completion together; None if it states none."""
    config = text_config(model)
    name = "max_position_embeddings"
    length = config.to_dict().get(config.attribute_map.get(name, name))
    return None if length is None else int(length)


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs go."""
    return embedding(model).device
