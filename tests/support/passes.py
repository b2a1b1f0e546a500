"""Small models whose training passes are compared, and what of them."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from gruppo import native
from gruppo.model import Lora, attach, completion_logp, multiplying
from gruppo.model.attention import adopt
from support.engines import TINY

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler here")
PROMPTS = [(5, 6, 7, 8, 9)] * 3 + [(11, 3)] * 4
LENGTHS = torch.tensor([6, 1, 4, 3, 0, 6, 2])


def build(name: str, **extra: object) -> nn.Module:
    """Norms and biases are not what they are at first, 1 and 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**TINY, **extra}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    assert adopt(model)
    return model


def adapted(name: str = "llama", *, half: bool = False, **options: object) -> nn.Module:
    """A model whose adapter has been trained: B is not 0."""
    pytest.importorskip("peft")
    dtype = torch.bfloat16 if half else torch.float32
    chosen = Lora(**{"rank": 3, "alpha": 7.0, **options})
    model = attach(build(name), chosen, compute_dtype=dtype)
    torch.manual_seed(2)
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if "lora_B" in place:
                parameter.normal_(std=0.3)
    return model


def outcome(model: nn.Module, *, fused: bool, half: bool = False) -> dict[str, Tensor]:
    """Log-probabilities and all gradients of a weighted sum."""
    torch.manual_seed(1)
    tokens, weights = torch.randint(0, 60, (7, 6)), torch.randn(7, 6)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        scored = completion_logp(model, PROMPTS, tokens, LENGTHS, packed=True, fused=fused)
    (scored.logp * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logp": scored.logp.detach()} | grads


def gap(mine: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest value of each tensor."""
    assert mine.keys() == other.keys()
    return max(
        float((mine[name] - other[name]).abs().max() / other[name].abs().max().clamp(min=1e-30))
        for name in other
    )


def assert_rounds_like_autocast(model: nn.Module, exact: dict[str, Tensor], products: str) -> None:
    """In bfloat16 the short pass is as far from ``exact`` (float32) as transformers' forward is."""
    if products == "native" and not native.can_multiply(torch.bfloat16):
        pytest.skip("no native bfloat16 products here")
    with multiplying(products):
        ours = gap(outcome(model, fused=True, half=True), exact)
    theirs = gap(outcome(model, fused=False, half=True), exact)
    assert theirs > 1e-3
    assert ours < 1.5 * theirs
