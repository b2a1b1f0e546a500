"""The trainable model with its optimizer, schedule and reference: where training state lives.

A :class:`Policy` scores completions, takes gradients and moves the weights. It draws nothing
(engines share its module), knows no loss and no reward, and writes no checkpoint files: it gives
its state as plain tensors and numbers and takes it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gruppo import dist
from gruppo.model import (
    Activations,
    Casts,
    Products,
    Scored,
    base_model,
    can_fuse,
    can_pack,
    choosing,
    completion_logp,
    is_adapted,
    is_autocast,
    merged_weights,
    save_adapter,
    summing,
    without_adapter,
)
from gruppo.model.parts import causal, device_of
from gruppo.policy.optim import (
    Optim,
    clip_gradients,
    gradient_norm,
    lr_at,
    make_adamw,
    update_ratio,
)
from gruppo.policy.reference import blend, frozen_copy

ReferenceKind = Literal["none", "copy", "adapter"]
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What an optimizer step did.

    ``grad_norm`` is the global L2 norm before clipping; ``update_ratio`` the L2 norm of the
    change of the weights relative to theirs. ``skipped``: the gradient was not finite, so the
    weights, moments and the policy's version are as they were.
    """

    grad_norm: float
    lr: float
    update_ratio: float
    skipped: bool


class Policy:
    """The policy that is trained.

    ``version`` counts optimizer updates made; ``packed`` says whether groups share their prompt's
    computation, ``fused`` whether a layer is few calls of compiled kernels. ``model`` is in
    evaluation mode except between :meth:`logp` and :meth:`step`.
    """

    def __init__(  # noqa: PLR0913 - a model, and seven independent ways to compute
        self,
        model: nn.Module,
        *,
        optim: Optim,
        total_updates: int,
        compute_dtype: torch.dtype = torch.float32,
        reference: ReferenceKind = "none",
        temperature: float = 1.0,
        packing: bool = True,
        products: Products = "torch",
        activations: Activations | None = None,
    ) -> None:
        """Take a model as :func:`gruppo.model.load` or :func:`gruppo.model.attach` gives it.

        Args:
            model: Its trainable parameters should be float32.
            optim: Optimizer settings.
            total_updates: Length of the learning-rate schedule.
            compute_dtype: bfloat16 computes under autocast; float32 and float64 as they are.
            reference: "copy" keeps a frozen copy of the model as it is now; "adapter" takes the
                model with its adapter off (no memory); "none" has no :meth:`ref_logp`.
            temperature: The sampling temperature, for all log-probabilities.
            packing: Compute a prompt once for its group, if the model allows it (tried here).
            products: What multiplies; with gradient checkpointing "torch" alone.
            activations: Those that an engine over the same module keeps; a :meth:`step` ends them.

        Raises:
            ValueError: a setting is bad, or "adapter" is asked for a model without one.
        """
        _refuse(model, reference, products)
        self.model = model
        self.optim = optim
        self.total_updates = total_updates
        self.compute_dtype = compute_dtype
        self.temperature = temperature
        self.version = 0
        self.reference_updates = 0
        self._autocast = is_autocast(compute_dtype)
        self._products: Products = products if self.device.type == "cpu" else "torch"
        self._casts = Casts()
        self.activations = activations or Activations()
        self._adamw = make_adamw(model, optim)
        self._kind = reference
        self._copy = frozen_copy(model, compute_dtype) if reference == "copy" else None
        model.eval()
        self.packed = packing and can_pack(model)
        self.fused = self.packed and can_fuse(model)

    @property
    def device(self) -> torch.device:
        """Where the model's embeddings are, and so its inputs and log-probabilities."""
        return device_of(self.model)

    @property
    def has_reference(self) -> bool:
        """Whether :meth:`ref_logp` can be called."""
        return self._kind != "none"

    def logp(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: Int[Tensor, "B T"],
        length: Int[Tensor, "B"],
        *,
        entropy: bool = False,
    ) -> Scored:
        """Log-probabilities under the current weights, with a gradient."""
        self.model.train()  # gradient checkpointing and adapter dropout ask for this mode
        return self._own(prompts, tokens, length, entropy=entropy)

    @torch.no_grad()
    def old_logp(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: Int[Tensor, "B T"],
        length: Int[Tensor, "B"],
        *,
        entropy: bool = False,
    ) -> Scored:
        """Log-probabilities under the current weights, without a gradient."""
        with _evaluating(self.model):
            return self._own(prompts, tokens, length, entropy=entropy)

    @torch.no_grad()
    def ref_logp(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: Int[Tensor, "B T"],
        length: Int[Tensor, "B"],
        *,
        entropy: bool = False,
    ) -> Scored:
        """Log-probabilities under the reference, at the same temperature.

        Raises:
            ValueError: the policy was made without a reference.
        """
        if not self.has_reference:
            raise ValueError("this policy has no reference: make it with reference = 'copy'")
        model = self.model if self._copy is None else self._copy
        switch = without_adapter(model) if self._copy is None else nullcontext()
        with _evaluating(model), switch:
            return _score(self, model, prompts, tokens, length, entropy=entropy)

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradient of ``loss`` to what was added since the last step."""
        alone = dist.world_size() == 1  # else a wrapper may wait for each gradient
        with summing() if alone else nullcontext():
            loss.backward()

    def step(self) -> UpdateReport:
        """Clip the summed gradient, move the weights, clear the gradient.

        A gradient that is not finite moves nothing and is dropped.
        """
        self._casts.clear()
        self.activations.clear()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        norm = gradient_norm(trainable)
        lr = lr_at(self.optim, self.version + 1, self.total_updates)
        skipped = not bool(torch.isfinite(norm))
        ratio = 0.0
        if not skipped:
            if self.optim.grad_clip is not None:
                clip_gradients(trainable, norm, self.optim.grad_clip)
            for group in self._adamw.param_groups:
                group["lr"] = lr
            self._adamw.step()
            ratio = update_ratio(self._adamw)
            self.version += 1
        self.discard_gradient()
        return UpdateReport(grad_norm=float(norm), lr=lr, update_ratio=ratio, skipped=skipped)

    def discard_gradient(self) -> None:
        """Drop what :meth:`backward` added since the last step (a step that is abandoned)."""
        self._casts.clear()
        self._adamw.zero_grad(set_to_none=True)
        self.model.eval()

    @torch.no_grad()
    def sync_reference(self, mixup: float = 1.0) -> None:
        """Move the reference to ``mixup * policy + (1 - mixup) * reference``.

        1 is a hard copy (DeepSeek-R1, arXiv:2501.12948); smaller is TR-DPO's soft update
        (arXiv:2404.09656, eq. 3).

        Raises:
            ValueError: ``mixup`` is not in (0, 1], or the reference is not a copy.
        """
        if not 0 < mixup <= 1:
            raise ValueError(f"mixup = {mixup} must lie in (0, 1]; 1 copies the policy")
        if self._copy is None:
            raise ValueError(f"reference = {self._kind!r} cannot be moved; use reference = 'copy'")
        blend(self._copy, self.model, mixup)
        self.reference_updates += 1

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Training state: tensors by name (views of the live ones), and plain numbers.

        Trainable weights, optimizer moments, and the reference once it was moved. Frozen weights
        are not in it: :meth:`restore` goes into a policy made from the same initial model.
        """
        tensors: dict[str, Tensor] = {}
        for name, p in _trainable(self.model):
            tensors[f"model.{name}"] = p.detach()
            for moment in _MOMENTS:
                if p in self._adamw.state:
                    tensors[f"optim.{moment}.{name}"] = self._adamw.state[p][moment]
        if self._copy is not None and self.reference_updates:
            for name, p in self._copy.named_parameters():
                tensors[f"reference.{name}"] = p.detach()
        scalars = {"version": self.version, "reference_updates": self.reference_updates}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, scalars

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, int]) -> None:
        """Take back what :meth:`state` gave; training then goes on bit for bit.

        Raises:
            ValueError: names or shapes are not those of this policy; nothing was changed.
        """
        moved = self._copy if scalars["reference_updates"] else None
        wanted = _expected(self.model, moved, tensors)
        self.activations.clear()
        self._adamw.state.clear()
        for name, p in _trainable(self.model):
            p.copy_(tensors[f"model.{name}"])
            if f"optim.step.{name}" in tensors:
                self._adamw.state[p] = {
                    moment: _moment(p, moment, tensors[f"optim.{moment}.{name}"])
                    for moment in _MOMENTS
                }
        for name, target in wanted.items():
            if name.startswith("reference."):
                target.copy_(tensors[name])
        self.discard_gradient()
        self.version = int(scalars["version"])
        self.reference_updates = int(scalars["reference_updates"])

    def weights(self) -> dict[str, Tensor]:
        """Weights under their Hugging Face names, a LoRA adapter merged in."""
        return merged_weights(self.model)

    def save_pretrained(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, *, adapter_only: bool = False
    ) -> None:
        """Write a folder that plain transformers (or PEFT, if ``adapter_only``) loads.

        Safetensors weights with the adapter merged in, configuration, generation configuration
        and tokenizer.

        Raises:
            ValueError: ``adapter_only`` for a model without an adapter.
        """
        if adapter_only and not is_adapted(self.model):
            raise ValueError("adapter_only: this model has no adapter; save it whole")
        if adapter_only:
            save_adapter(self.model, folder)
        else:
            base = causal(base_model(self.model))
            base.save_pretrained(folder, state_dict=self.weights())
        tokenizer.save_pretrained(folder)

    def _own(
        self, prompts: Sequence[Sequence[int]], tokens: Tensor, length: Tensor, *, entropy: bool
    ) -> Scored:
        """By the policy itself, so by what is known of it."""
        known = self.activations
        return _score(self, self.model, prompts, tokens, length, entropy=entropy, known=known)


def _score(
    policy: Policy,
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: Tensor,
    length: Tensor,
    *,
    entropy: bool,
    known: Activations | None = None,
) -> Scored:
    # without a gradient a layer's copies are let go with the layer
    keeps = model is policy.model and torch.is_grad_enabled()
    half = torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=policy._autocast)
    with half, choosing(policy._products):
        return completion_logp(
            model,
            prompts,
            tokens,
            length,
            temperature=policy.temperature,
            entropy=entropy,
            packed=policy.packed,
            fused=policy.fused,
            casts=policy._casts if keeps else None,
            activations=known,
        )


def _refuse(model: nn.Module, reference: ReferenceKind, products: Products) -> None:
    if reference not in ("none", "copy", "adapter"):
        raise ValueError(f"reference = {reference!r} must be one of 'none', 'copy', 'adapter'")
    if reference == "adapter" and not is_adapted(model):
        raise ValueError("reference = 'adapter' needs a LoRA adapter; use reference = 'copy'")
    if products not in ("torch", "onednn", "native"):
        raise ValueError(f"products = {products!r} must be one of 'torch', 'onednn', 'native'")
    recomputes = any(vars(module).get("gradient_checkpointing") for module in model.modules())
    if products != "torch" and recomputes:
        raise ValueError(
            f"products = {products!r} with a model of gradient checkpointing: what is recomputed "
            "would differ by rounding; use products = 'torch'"
        )


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _moment(p: Tensor, moment: str, saved: Tensor) -> Tensor:
    # the fused kernels want the step counter on the device, in float32
    dtype = torch.float32 if moment == "step" else p.dtype
    return saved.to(device=p.device, dtype=dtype, copy=True)


def _expected(
    model: nn.Module, reference: nn.Module | None, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The live tensors that a checkpoint must hold, by its names; refuses other sets and shapes.

    ``reference`` is the copy that was moved before the checkpoint, None if none was.
    """
    expected: dict[str, Tensor] = {}
    for name, p in _trainable(model):
        expected[f"model.{name}"] = p
        if f"optim.step.{name}" in tensors:
            shapes = {"exp_avg": p, "exp_avg_sq": p, "step": p.new_zeros(())}
            expected |= {f"optim.{key}.{name}": shapes[key] for key in _MOMENTS}
    if reference is not None:
        expected |= {f"reference.{name}": p for name, p in reference.named_parameters()}
    wrong = sorted(expected.keys() ^ tensors.keys())
    if wrong:
        raise ValueError(
            f"the checkpoint does not fit this model, adapter or reference: {len(wrong)} "
            f"tensors missing or unknown, {', '.join(wrong[:3])} among them"
        )
    for name, target in expected.items():
        if tensors[name].shape != target.shape:
            raise ValueError(
                f"checkpoint tensor {name} has shape {tuple(tensors[name].shape)}, this "
                f"model needs {tuple(target.shape)}"
            )
    return expected


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode of before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
