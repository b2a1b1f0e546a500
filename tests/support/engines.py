"""The engines that the contract tests run, and what the tests compare them with.

A new engine joins by one line in ``ENGINES``: a factory from a model, a decode function and the
number of rows it may decode at once.
"""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from gruppo.engine import LocalEngine
from gruppo.model.attention import adopt
from gruppo.types import Completion, Engine, Request

END = 256  # <|im_end|> of the byte tokenizer
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A configuration that every architecture takes, for models of random weights."""


Make = Callable[..., Engine]


def shared(model: nn.Module, decode: Callable[[Sequence[int]], str], max_rows: int = 128) -> Engine:
    assert adopt(model), "the tiny model takes gruppo's attention"
    engine = LocalEngine(model, decode, pad_token=END, max_rows=max_rows)
    assert engine.is_shared, "the tiny model shares prompts"
    return engine


def cramped(
    model: nn.Module, decode: Callable[[Sequence[int]], str], max_rows: int = 128
) -> Engine:
    adopt(model)
    return LocalEngine(model, decode, pad_token=END, max_rows=max_rows, max_cached_tokens=60)


def plain(model: nn.Module, decode: Callable[[Sequence[int]], str], max_rows: int = 128) -> Engine:
    return LocalEngine(model, decode, pad_token=END, max_rows=max_rows, kind="plain")


ENGINES: dict[str, Make] = {"shared": shared, "cramped": cramped, "plain": plain}


def sharpen(model: nn.Module) -> nn.Module:
    """Enlarge a fresh model's matrices, so that context matters and logits spread."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(25 if "embed" in name else 10)
    return model.eval()


def letters(ids: Sequence[int]) -> str:
    """A decode without loss, for random tokens: one character an id."""
    return "".join(chr(100 + i) for i in ids)


def requests(*lengths: int, num_samples: int = 1, step: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    return [
        Request(
            tokens=tuple(torch.randint(0, 250, (length,), generator=generator).tolist()),
            num_samples=num_samples,
            key=(7, step, draw),
        )
        for draw, length in enumerate(lengths)
    ]


def logits_of(model: nn.Module, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Logits [n, V] that predict ``tokens``, from one plain forward without cache or padding."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False)
    return output.logits[0, len(prompt) - 1 : -1].double()


def assert_same(left: Completion, right: Completion) -> None:
    """Equal but for the rounding of log-probabilities."""
    assert left.tokens == right.tokens
    assert left.logp == pytest.approx(right.logp, abs=1e-5)
    same = dict.fromkeys(("logp",), ())
    assert dataclasses.replace(left, **same) == dataclasses.replace(right, **same)


def unequal_groups() -> list[Request]:
    """Four groups of unequal size and prompt length, for models of ``TINY``'s vocabulary."""
    generator = torch.Generator().manual_seed(3)
    return [
        Request(
            tokens=tuple(torch.randint(3, 97, (length,), generator=generator).tolist()),
            num_samples=count,
            key=(0, index),
        )
        for index, (length, count) in enumerate(((9, 3), (4, 4), (13, 1), (2, 2)))
    ]
