"""Log-probabilities of completions under a causal language model: the one place of the shift.

Logits at a position predict the *next* token. Everywhere else in gruppo ``logp[b, 0]`` belongs to
the first completion token of row ``b``; the alignment is made here. One function serves the old,
the reference and the current policy. It draws nothing and knows no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gruppo.model.head import logit_rule, token_logp
from gruppo.model.parts import body, device_of, head


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Natural-log probabilities of completion tokens; 0 beyond each row's length.

    ``entropy`` (nats, of the whole next-token distribution) is None unless asked for.
    """

    logp: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Right-padded inputs ``ids``, and where in them the completion tokens are predicted.

    ``source`` are the flat positions whose hidden states predict the N true completion tokens,
    which lie at ``valid`` (row-major order).
    """

    ids: Int[Tensor, "B L"]
    source: Int[Tensor, "N"]
    valid: Bool[Tensor, "B T"]


def completion_logp(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: Int[Tensor, "B T"],
    length: Int[Tensor, "B"],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int = 512,
) -> Scored:
    """Score ``tokens`` after their ``prompts`` (one per row), differentiably.

    ``log softmax(z / temperature)`` with z the model's logits, widened to float32 before the
    division. Rows are padded on the right, where a causal model cannot see the padding: no
    attention mask is needed. The head is applied to completion positions only, ``chunk`` of them
    at a time. Run it under ``torch.autocast`` for bfloat16 products.

    Args:
        model: A Hugging Face causal language model, with or without a PEFT adapter.
        prompts: B prompts, as token ids.
        tokens: Completion token ids; entries beyond ``length`` are ignored.
        length: Number of completion tokens in each row (0 is allowed).
        temperature: The sampling temperature.
        entropy: Whether to compute entropies too.
        chunk: Positions projected to the vocabulary at once (memory: chunk x V floats, thrice).

    Returns:
        float32 tensors [B, T] (float64 for a float64 model) on the model's device.

    Raises:
        ValueError: a row has a completion but an empty prompt (nothing predicts its first token),
            or ``temperature`` is not positive.
    """
    device = device_of(model)
    layout = _lay_out(prompts, tokens, length)
    valid = layout.valid.to(device)
    output = body(model)(input_ids=layout.ids.to(device), use_cache=False)
    logp, spread = token_logp(
        head(model),
        output.last_hidden_state.flatten(0, 1)[layout.source.to(device)],
        tokens.to(device)[valid],
        rule=logit_rule(model, temperature),
        entropy=entropy,
        chunk=chunk,
    )
    empty = torch.zeros(valid.shape, device=device, dtype=logp.dtype)
    return Scored(
        logp=empty.masked_scatter(valid, logp),
        entropy=empty.masked_scatter(valid, spread) if entropy else None,
    )


def _lay_out(
    prompts: Sequence[Sequence[int]], tokens: Int[Tensor, "B T"], length: Int[Tensor, "B"]
) -> _Layout:
    """Join prompts and completions; the last token of a row predicts nothing and is left out."""
    num_rows, width = tokens.shape
    assert len(prompts) == num_rows == len(length), "one prompt and one length per row"
    counts = length.tolist()
    assert all(0 <= count <= width for count in counts), "lengths within [0, T]"
    rows = []
    for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        if count and not prompt:
            raise ValueError(
                f"row {row}: the prompt is empty, so nothing predicts the first completion token; "
                "give it at least one token (the BOS token, say)"
            )
        rows.append([*prompt, *tokens[row, : max(count - 1, 0)].tolist()] or [0])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long)
    steps = torch.arange(width)
    valid = steps < torch.tensor(counts)[:, None]
    first = torch.tensor([row * longest + len(p) - 1 for row, p in enumerate(prompts)])
    return _Layout(ids=ids, source=(first[:, None] + steps)[valid], valid=valid)
