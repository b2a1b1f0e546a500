"""AdamW, its learning-rate schedule and gradient clipping: what turns a gradient into an update.

Weights are moved in the type they are held in (float32 masters). Deciding when to step, and what
to do with a gradient that is not finite, is the policy's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

SLICE: Final = 2**20
"""Numbers of a weight that are looked at together on a CPU: 4 MiB, what its cache holds."""
Schedule = Literal["constant", "linear", "cosine"]

# Share of the way from the floor to the base rate, by progress in [0, 1] after the warm-up.
_SHAPES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """AdamW (arXiv:1711.05101) and its schedule.

    ``lr`` is reached after ``warmup_steps`` updates. ``betas`` are the decay rates of both moments,
    ``eps`` stands beside the root in the divisor. ``weight_decay`` spares norms and biases.
    ``grad_clip`` bounds the global gradient norm (None: no bound). ``min_ratio`` is the floor of
    "linear" and "cosine", as a share of ``lr``.

    >>> Optim(lr=2e-5).schedule
    'constant'
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0
    schedule: Schedule = "constant"
    warmup_steps: int = 10
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not (self.lr >= 0 and math.isfinite(self.lr)):
            raise ValueError(f"optim.lr = {self.lr} must be a finite number >= 0 (1e-6, say)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas = {self.betas} must lie in [0, 1)")
        if not (self.eps > 0 and math.isfinite(self.eps)):
            raise ValueError(f"optim.eps = {self.eps} must be positive (1e-8, say)")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"optim.weight_decay = {self.weight_decay} must be >= 0")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"optim.grad_clip = {self.grad_clip} must be positive, or left out")
        if self.schedule not in _SHAPES:
            raise ValueError(
                f"optim.schedule = {self.schedule!r} must be one of {', '.join(_SHAPES)}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps = {self.warmup_steps} must be >= 0")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"optim.min_ratio = {self.min_ratio} must lie in [0, 1]")


def lr_at(optim: Optim, update: int, total: int) -> float:
    """Learning rate of optimizer update number ``update`` (from 1) of ``total``.

    Linear warm-up ``lr * min(1, update / warmup_steps)`` - the first update already moves the
    weights - and then the schedule, from ``lr`` at the end of the warm-up to its floor at
    ``total``.

    >>> lr_at(Optim(lr=1.0, warmup_steps=4), 1, 100)
    0.25
    """
    assert update >= 1, "updates are counted from 1"
    if update < optim.warmup_steps:
        return optim.lr * update / optim.warmup_steps
    remaining = max(total - optim.warmup_steps, 1)
    progress = min(max(update - optim.warmup_steps, 0) / remaining, 1.0)
    share = _SHAPES[optim.schedule](progress)
    return optim.lr * (optim.min_ratio + (1.0 - optim.min_ratio) * share)


def make_adamw(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; those with fewer than 2 dimensions do not decay.

    Raises:
        ValueError: nothing in the model is trainable.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameters")
    decayed = [p for p in trainable if p.ndim >= 2]
    spared = [p for p in trainable if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in trainable)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=fused,
        foreach=None if fused else True,
    )


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Global L2 norm of the gradients there are (0 if there are none); a scalar tensor."""
    return get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients of global norm ``norm`` by ``min(1, max_norm / (norm + 1e-6))``, in place."""
    clip_grads_with_norm_(parameters, max_norm, norm)


@torch.no_grad()
def update_ratio(adamw: torch.optim.AdamW) -> float:
    """Size of AdamW's last update relative to the weights, ``|delta| / |weights|`` (L2).

    Computed from the moments, a slice at a time, so that no copy is needed; parameters without a
    gradient so far count as unmoved.
    """
    moved, size = 0.0, 0.0
    for group in adamw.param_groups:
        for p in group["params"]:
            state = adamw.state.get(p)
            if state and p.grad is not None:
                moved += _squares(p, state, group)
            size += float(torch.linalg.vector_norm(p)) ** 2
    return math.sqrt(moved / size) if size else 0.0


def _squares(p: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> float:
    """Sum of squares of AdamW's last change of ``p``."""
    step = float(state["step"])
    whole = (p, state["exp_avg"], state["exp_avg_sq"])
    # a device of its own has room, and dislikes small pieces
    size = SLICE if p.device.type == "cpu" else 64 * SLICE
    weights, means, squares = (tensor.reshape(-1).split(size) for tensor in whole)
    sums = [
        _delta(*part, step, group).square_().sum(dtype=torch.float64)
        for part in zip(weights, means, squares, strict=True)
    ]
    return float(torch.stack(sums).sum()) if sums else 0.0


def _delta(
    p: Tensor, mean: Tensor, square: Tensor, step: float, group: Mapping[str, Any]
) -> Tensor:
    """AdamW's last change up to sign: lr (m^ / (sqrt(v^) + eps) + decay * p before)."""
    lr, decay, eps = group["lr"], group["weight_decay"], group["eps"]
    beta1, beta2 = group["betas"]
    spread = square.div(1 - beta2**step).sqrt_().add_(eps)
    moved = mean.div(1 - beta1**step).div_(spread).mul_(lr)
    if decay:
        before = (p + moved) / (1 - lr * decay)
        moved.add_(before, alpha=lr * decay)
    return moved
