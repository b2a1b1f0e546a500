"""Groups packed into one row of tokens, the prompt once per group: layout and attention.

A packed row is ``[prompt | completion 1 | completion 2 | … ]`` for one group after another,
without padding. Position ids of every completion go on from its prompt's, and a completion sees
its prompt and itself only, so each token's hidden state is that of the plain row
``[prompt | completion]``. The prompt's part of the work is done once instead of G times.

It knows no model: the attention function of ``attention.py`` calls :func:`packed_attention` when
a layout comes with the forward's keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gruppo.model.rectangle import Part

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query [B, H, Q, D], key [B, K, S, D], value [B, K, S, E], mask [B, 1, Q, S]) to [B, Q, H, E]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedGroup:
    """Where one group lies in the packed row: its prompt, and its completions padded to T.

    ``index`` are positions in the packed row (0 beyond a completion's end); ``filled`` are the
    entries of ``index``, counted row by row, that hold a token.
    """

    start: int
    stop: int
    index: Int[Tensor, "G T"]
    filled: Int[Tensor, "N"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packing:
    """A packed row: token ``ids``, their ``positions``, and where its groups lie.

    ``source`` are the positions whose hidden states predict the completion tokens, row by row.
    ``masks`` are the block masks made for it so far, by sliding window (``flex.py``).
    ``parts`` say the same as ``groups``: which positions attend to which.
    """

    ids: Int[Tensor, "N"]
    positions: Int[Tensor, "N"]
    groups: tuple[PackedGroup, ...]
    source: Int[Tensor, "M"]
    parts: tuple[Part, ...]
    masks: dict[int | None, Any] = field(default_factory=dict)


def pack(
    prompts: Sequence[Sequence[int]],
    tokens: Int[Tensor, "B T"],
    counts: Sequence[int],
    *,
    device: torch.device | str = "cpu",
) -> Packing:
    """Lay rows out in one packed row; neighbours with the same prompt share it.

    The last token of a completion predicts nothing and is left out.

    Args:
        prompts: One prompt per row, not empty.
        tokens: Completion tokens.
        counts: Completion lengths.
        device: Where the model is.
    """
    ids: list[int] = []
    positions: list[int] = []
    groups: list[PackedGroup] = []
    source: list[int] = []
    parts: list[Part] = []
    for prompt, rows in _runs(prompts):
        start = len(ids)
        ids += prompt
        positions += range(len(prompt))
        stop = len(ids)
        spans = []
        for row in rows:
            read = max(counts[row] - 1, 0)
            spans.append((len(ids), read))
            source += [stop - 1] * (counts[row] > 0) + list(range(len(ids), len(ids) + read))
            ids += tokens[row, :read].tolist()
            positions += range(len(prompt), len(prompt) + read)
        groups.append(_group(start, stop, spans, device))
        parts += _parts(slice(start, stop), spans)
    return Packing(
        ids=torch.tensor(ids, device=device),
        positions=torch.tensor(positions, device=device),
        groups=tuple(groups),
        source=torch.tensor(source, dtype=torch.long, device=device),
        parts=tuple(parts),
    )


def _parts(prompt: slice, spans: list[tuple[int, int]]) -> list[Part]:
    """The prompt alone, each completion alone, and all completions over the prompt."""
    if prompt.start == prompt.stop:  # its completions are empty too: nothing predicts a first token
        return []
    alone = [prompt, *(slice(first, first + read) for first, read in spans if read)]
    parts = [Part(here, here, causal=True) for here in alone]
    everything = slice(prompt.stop, alone[-1].stop)
    return [*parts, Part(everything, prompt, causal=False)] if len(alone) > 1 else parts


def _runs(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], list[int]]]:
    for prompt, rows in groupby(range(len(prompts)), key=lambda row: tuple(prompts[row])):
        yield prompt, list(rows)


def _group(
    start: int, stop: int, spans: list[tuple[int, int]], device: torch.device | str
) -> PackedGroup:
    width = max(read for _, read in spans)
    steps = torch.arange(width)
    first = torch.tensor([position for position, _ in spans])
    valid = steps < torch.tensor([read for _, read in spans])[:, None]
    index = torch.where(valid, first[:, None] + steps, 0)
    filled = valid.flatten().nonzero()[:, 0]
    return PackedGroup(start=start, stop=stop, index=index.to(device), filled=filled.to(device))


def packed_attention(
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N E"],
    groups: Sequence[PackedGroup],
    kernel: Kernel,
    *,
    window: int | None = None,
) -> Float[Tensor, "1 N H E"]:
    """Attention over a packed row: two calls of ``kernel`` per group, prompt and completions.

    ``window`` is a sliding window: a token sees itself and the ``window - 1`` tokens before it.
    """
    parts = []
    for group in groups:
        here = slice(group.start, group.stop)
        q, k, v = query[:, :, here], key[:, :, here], value[:, :, here]
        parts.append(kernel(q, k, v, _seen(group, 0, q.device, window)))
        if group.index.shape[1] == 0:
            continue
        index = group.index
        own = [tensor[0][:, index].transpose(0, 1) for tensor in (query, key, value)]
        size = len(index)
        keys = torch.cat([k.expand(size, -1, -1, -1), own[1]], dim=2)
        values = torch.cat([v.expand(size, -1, -1, -1), own[2]], dim=2)
        mixed = kernel(own[0], keys, values, _seen(group, index.shape[1], q.device, window))
        parts.append(mixed.flatten(0, 1)[group.filled][None])
    return torch.cat(parts, dim=1)


def _seen(
    group: PackedGroup, width: int, device: torch.device, window: int | None
) -> Bool[Tensor, "1 1 Q S"]:
    """What each query sees: of the prompt (width 0), or of prompt and own completion."""
    prompt = group.stop - group.start
    keys = torch.arange(prompt + width, device=device)
    queries = keys[prompt:] if width else keys
    apart = queries[:, None] - keys
    seen = apart >= 0
    if window is not None:
        seen &= apart < window
    return seen[None, None]
