"""An engine that runs the policy's own module in this process.

It shares weights with the policy by default, so sampling and training differ by rounding alone. A
prompt is read once for all its completions; rows are decoded in padded batches from which they
leave as they end. It does not hold prompts of a group once in attention, does not let waiting
rows enter a running batch, and captures no graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from gruppo.engine.base import Decode, check_requests, check_sampling, complete, ends_in_stop, room
from gruppo.engine.local.batch import Prompts, Row, Wave, plan_waves
from gruppo.engine.local.cache import make_cache, select_rows
from gruppo.engine.sampler import sample
from gruppo.model.parts import causal, context_length, text_config
from gruppo.types import Completion, Request, Sampling

_HALF = (torch.bfloat16, torch.float16)
_COMPUTE_DTYPES = (torch.float32, torch.float64, *_HALF)


@final
class LocalEngine:
    """Draws completions with a Hugging Face causal language model in this process.

    Args:
        model: the module, with an adapter or without (shared with the policy, or the engine's
            own). Its train or eval mode, its ``requires_grad`` flags and gradients are as before
            after every call.
        decode: token ids to text, for ``Completion.text`` and stop strings.
        pad_token: any valid token id; fills the left of shorter prompts, and is masked.
        compute_dtype: bfloat16 or float16 runs a float32 model under autocast; a model whose
            weights have another type than float32 runs as it is.
        max_rows: most completions decoded at once. Which completions are drawn does not depend on
            it, except for rounding of the logits.

    Raises:
        ValueError: if ``max_rows`` or ``compute_dtype`` cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        decode: Decode,
        *,
        pad_token: int,
        compute_dtype: torch.dtype = torch.float32,
        max_rows: int = 128,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows = {max_rows}; use 1 or more")
        if compute_dtype not in _COMPUTE_DTYPES:
            raise ValueError(f"compute_dtype = {compute_dtype}; use bfloat16, float16 or float32")
        self._model: nn.Module | None = model
        self._decode = decode
        self._pad_token = pad_token
        self._compute_dtype = compute_dtype
        self._max_rows = max_rows
        self._version = 0

    @property
    def version(self) -> int:
        """Version of the weights, as last told by ``load``."""
        return self._version

    def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> list[tuple[Completion, ...]]:
        """Draw ``num_samples`` completions for every request, in the order of the requests.

        A completion ends with a stop token or stop string ("stop"), or when ``max_tokens`` or the
        model's context is used up ("length").

        Raises:
            ValueError: for a request or a sampling field that cannot be honoured, or after close.
            FloatingPointError: if the model's logits hold NaN or inf.
        """
        model = self._open()
        context = context_length(model)
        check_sampling(sampling)
        check_requests(requests, vocab_size=text_config(model).vocab_size, context=context)
        limits = [room(request, sampling, context) for request in requests]
        drawn: dict[tuple[int, int], Completion] = {}
        with _generating(model, self._compute_dtype) as cache_dtype:
            for rows in plan_waves(requests, limits, max_rows=self._max_rows):
                wave = self._run(model, rows, requests, sampling=sampling, dtype=cache_dtype)
                for row, (tokens, logp, stopped) in zip(rows, wave.results(), strict=True):
                    drawn[row.request, row.sample] = self._complete(tokens, logp, stopped, sampling)
        empty = self._complete([], [], False, sampling)
        return [
            tuple(drawn.get((index, at), empty) for at in range(request.num_samples))
            for index, request in enumerate(requests)
        ]

    def load(self, weights: Mapping[str, Tensor] | None, version: int) -> None:
        """Take new weights and their version number.

        Args:
            weights: None if the module is shared with the policy, which has changed it already;
                else a tensor for every name of the model's state (of tied ones, any).
            version: recorded with every token drawn from now on.

        Raises:
            ValueError: if names or shapes are not the model's; nothing is changed then.
        """
        if weights is not None:
            _copy_weights(self._open(), weights)
        self._version = version

    def close(self) -> None:
        """Let go of the model. Calling it twice is fine."""
        self._model = None

    def _open(self) -> nn.Module:
        if self._model is None:
            raise ValueError("this engine is closed; make a new LocalEngine")
        return self._model

    def _complete(
        self, tokens: list[int], logp: list[float], stopped: bool, sampling: Sampling
    ) -> Completion:
        return complete(
            tokens,
            logp,
            stopped=stopped,
            sampling=sampling,
            version=self._version,
            decode=self._decode,
        )

    def _run(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        requests: Sequence[Request],
        *,
        sampling: Sampling,
        dtype: torch.dtype | None,
    ) -> Wave:
        """Draw all rows of one wave."""
        device = next(model.parameters()).device
        prompts = Prompts.of(rows, requests, pad_token=self._pad_token, device=device)
        wave = Wave(rows, requests, prompts)
        ends = torch.tensor(sampling.stop_tokens, dtype=torch.long, device=device)
        cache = make_cache(causal(model).config, dtype)
        logits = _forward(model, prompts.tokens, prompts.mask, prompts.positions, cache=cache)
        select_rows(cache, prompts.source)
        logits = logits[prompts.source]
        while True:
            token, logp = sample(logits, wave.uniforms(), sampling)
            wave.write(token, logp)
            stopped = (token[:, None] == ends).any(-1)
            if sampling.stop:
                stopped |= self._spoken(wave, sampling).to(device)
            keep = wave.retire(stopped)
            if keep is not None:
                if len(keep) == 0:
                    return wave
                select_rows(cache, keep)
                token = token[keep]
            logits = _forward(model, token[:, None], wave.mask(), wave.positions(), cache=cache)

    def _spoken(self, wave: Wave, sampling: Sampling) -> Tensor:
        """Which running rows [N] have just completed a stop string."""
        stop, decode = sampling.stop, self._decode
        return torch.tensor([ends_in_stop(t, stop=stop, decode=decode) for t in wave.running()])


def _forward(
    model: nn.Module,
    tokens: Int[Tensor, "N Q"],
    mask: Tensor,
    positions: Int[Tensor, "N Q"],
    *,
    cache: DynamicCache,
) -> Float[Tensor, "N V"]:
    """Logits after the last of ``tokens``, whose keys and values are added to ``cache``."""
    output = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def _is_single(parameter: Tensor) -> bool:
    return parameter.dtype == torch.float32


@contextmanager
def _generating(model: nn.Module, compute_dtype: torch.dtype) -> Iterator[torch.dtype | None]:
    """Eval mode, no gradients, and one autocast context for all forwards; undone afterwards.

    Yields the type in which to keep keys and values, None for whatever the model makes.
    """
    weight = next(model.parameters())
    mixed = compute_dtype in _HALF and _is_single(weight)
    training = [module for module in model.modules() if module.training]
    # Autocast keeps the 16-bit copy of a weight only if the weight asks for a gradient; a frozen
    # one (under an adapter) would be cast again at every token.
    frozen = [p for p in model.parameters() if mixed and not p.requires_grad and _is_single(p)]
    # Within a caller's own autocast context the 16-bit copies live on: here those of the weights
    # before their last update, afterwards ours, made without a graph that training could use.
    torch.clear_autocast_cache()
    model.eval()
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.no_grad(), torch.autocast(weight.device.type, compute_dtype, enabled=mixed):
            yield compute_dtype if mixed else None
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module in training:
            module.training = True
        torch.clear_autocast_cache()


def _copy_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
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
