"""The policy's own module, as the engine borrows it: its modes for drawing, and taking weights.

Whatever is changed here for drawing is as before afterwards. This module draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def _is_single(parameter: Tensor) -> bool:
    return parameter.dtype == torch.float32


@contextmanager
def generating(
    model: nn.Module, compute_dtype: torch.dtype, *, keeps_casts: bool = True
) -> Iterator[torch.dtype | None]:
    """Eval mode, no gradients, and one autocast context for all forwards; undone afterwards.

    Without ``keeps_casts`` autocast casts weights at every use (``halves.py`` says why). Yields
    the type in which to keep keys and values, None for whatever the model makes.
    """
    weight = next(model.parameters())
    mixed = compute_dtype in HALF and _is_single(weight)
    training = [module for module in model.modules() if module.training]
    # Autocast keeps the 16-bit copy of a weight only if the weight asks for a gradient; a frozen
    # one (under an adapter) would be cast again at every token.
    tricked = mixed and keeps_casts
    frozen = [p for p in model.parameters() if tricked and not p.requires_grad and _is_single(p)]
    # Within a caller's own autocast context the 16-bit copies live on: here those of the weights
    # before their last update, afterwards ours, made without a graph that training could use.
    torch.clear_autocast_cache()
    model.eval()
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with (
            torch.no_grad(),
            torch.autocast(
                weight.device.type, compute_dtype, enabled=mixed, cache_enabled=keeps_casts
            ),
        ):
            yield compute_dtype if mixed else None
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module in training:
            module.training = True
        torch.clear_autocast_cache()


def copy_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into the model, all or nothing."""
    own = model.state_dict()
    if unknown := sorted(set(weights) - set(own)):
        raise ValueError(
            f"weights hold {unknown[0]!r} (and {len(unknown) - 1} more), which the model does not "
            "have; give the state of a model of the same architecture"
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"weight {name!r} has shape {tuple(tensor.shape)}, the model's has "
                f"{tuple(own[name].shape)}; give the state of a model of the same size"
            )
    covered = {own[name].data_ptr() for name in weights}
    if missing := [name for name, tensor in own.items() if tensor.data_ptr() not in covered]:
        raise ValueError(
            f"weights lack {missing[0]!r} (and {len(missing) - 1} more); give the whole state"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
