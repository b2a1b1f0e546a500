"""Low-rank adapters (LoRA, arXiv:2106.09685) through PEFT, an optional dependency.

With the adapter off the model is the reference policy, so a reference costs no memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from gruppo.model.precision import cast_frozen, is_autocast

_MISSING = 'LoRA needs the package peft: pip install "gruppo[peft]"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA adapter: W + (alpha / rank) B A on every matrix named by ``targets``.

    ``targets`` are module name endings, or "all-linear" (all but the head). With ``dropout`` > 0
    the training forward differs from what was sampled, so ratios start off 1.

    >>> Lora(rank=8).alpha
    32.0
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    kind: Literal["lora"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank = {self.rank} must be at least 1")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha = {self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout = {self.dropout} must lie in [0, 1)")
        if not self.targets:
            raise ValueError('lora.targets is empty: name modules or use ["all-linear"]')


def attach(
    model: nn.Module, lora: Lora, *, compute_dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Wrap ``model`` with a fresh adapter (its output unchanged at first) and freeze the rest.

    The frozen matrices are cast to bfloat16 if that is the ``compute_dtype``; the adapter is
    float32 (float64 in a float64 model).

    Raises:
        ImportError: peft is not installed.
        ValueError: ``lora.targets`` match nothing.
    """
    peft = _peft()
    everything = lora.targets == ("all-linear",)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if everything else list(lora.targets),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers by a name that is on its way out
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.get_peft_model(cast(Any, model), settings)
    if is_autocast(compute_dtype):
        cast_frozen(wrapped, compute_dtype)
    return wrapped.eval()


def is_adapted(model: nn.Module) -> bool:
    """Whether ``model`` carries a PEFT adapter."""
    try:
        return isinstance(model, _peft().PeftModel)
    except ImportError:
        return False


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Run the base model inside this context: the reference policy of a LoRA run."""
    with cast(Any, model).disable_adapter():
        yield


def base_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model under the adapter (or the model itself), adapter still in place."""
    return cast(Any, model).get_base_model() if is_adapted(model) else model


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the plain model with the adapter added in; ``model`` is left as it is.

    Sums are made in float32. A model without an adapter gives its own state dict.
    """
    if not is_adapted(model):
        return dict(model.state_dict())
    layer_type = _peft().tuners.lora.LoraLayer
    base = base_model(model)
    layers = {name: m for name, m in base.named_modules() if isinstance(m, layer_type)}
    weights = {}
    for name, tensor in base.state_dict().items():
        owner, _, rest = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        if owner in layers and rest == "weight":
            layer = cast(Any, layers[owner])
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensor = tensor.to(wide)
            for active in layer.active_adapters:
                tensor = tensor + layer.get_delta_weight(active).to(wide)
        weights[f"{owner}.{rest}" if rest else name] = tensor
    return weights


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return peft
