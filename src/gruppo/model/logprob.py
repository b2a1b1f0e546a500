"""Log-probabilities of completions under a causal language model: the one place of the shift.

Logits at a position predict the *next* token. Everywhere else in gruppo ``logp[b, 0]`` belongs to
the first completion token of row ``b``; the alignment is made here. One function serves the old,
the reference and the current policy. It draws nothing and knows no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gruppo.model.activations import Activations
from gruppo.model.adapter import awake
from gruppo.model.attention import NAME, PACKING
from gruppo.model.casts import Casts
from gruppo.model.decoder_pass import decoder_states, find_pass
from gruppo.model.head import logit_rule, token_logp
from gruppo.model.packing import Packing, pack
from gruppo.model.parts import body, causal, device_of, embedding, head
from gruppo.model.products import taking_over
from gruppo.model.thrift import thrifty


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Natural-log probabilities of completion tokens; 0 beyond each row's length.

    ``entropy`` (nats, of the whole next-token distribution) is None unless asked for.
    """

    logp: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"] | None


# Root of the mean square of log-probabilities' differences that rounding can explain.
_PACKED_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2}
# the same operations in another order; float32 weights, or bfloat16 products over them
_FUSED_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: _PACKED_TOLERANCE[torch.bfloat16]}
# What is tried: two groups.
_PROMPTS = [(5, 6, 7), (5, 6, 7), (8, 9), (8, 9), (8, 9)]
_LENGTH = torch.tensor([6, 3, 1, 4, 5])
# Adapters that are new are told apart from wrong ones by how much of their effect is missed.
_MISSED = 0.25


def completion_logp(  # noqa: PLR0913 - what to score, and four independent ways to
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: Int[Tensor, "B T"],
    length: Int[Tensor, "B"],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    packed: bool = False,
    fused: bool = False,
    chunk: int = 512,
    casts: Casts | None = None,
    activations: Activations | None = None,
) -> Scored:
    """Score ``tokens`` after their ``prompts`` (one per row), differentiably.

    ``log softmax(z / temperature)`` with z the model's logits, widened to float32 before the
    division. Plain rows are padded on the right, where a causal model cannot see the padding.
    Packed, neighbouring rows with one prompt share it. Products are in the type of autocast.

    Args:
        model: A Hugging Face causal language model, with or without a PEFT adapter.
        prompts: B prompts, as token ids.
        tokens: Completion token ids; entries beyond ``length`` are ignored.
        length: Number of completion tokens in each row (0 is allowed).
        temperature: The sampling temperature.
        entropy: Whether to compute entropies too.
        packed: Compute each prompt once for its neighbouring rows; if :func:`can_pack`.
        fused: Packed rows in few calls a layer (``decoder_pass.py``); if :func:`can_fuse`.
        chunk: Positions projected to the vocabulary at once.
        casts: Keeps copies of the weights, as products take them, for the next pass.
        activations: Results of products over the same weights, which a fused pass need not make.

    Returns:
        float32 tensors [B, T] (float64 for a float64 model) on the model's device.

    Raises:
        ValueError: nothing before a completion, or ``temperature`` is not positive.
    """
    device, counts = device_of(model), _checked(prompts, tokens, length)
    valid = (torch.arange(tokens.shape[1]) < torch.tensor(counts)[:, None]).to(device)
    decoder = find_pass(model) if packed and fused else None
    if decoder is not None:
        packing = pack(prompts, tokens, counts)
        given = (packing, prompts, tokens, counts)
        known = activations.find(*given, decoder=decoder) if activations else None
        states = decoder_states(decoder, packing, casts, known)
    else:
        states = _modules_states(model, prompts, tokens, counts, packed=packed)
    rule, said = logit_rule(model, temperature), tokens.to(device)[valid]
    logp, spread = token_logp(
        head(model), states, said, rule=rule, entropy=entropy, chunk=chunk, casts=casts
    )
    empty = torch.zeros(valid.shape, device=device, dtype=logp.dtype)
    return Scored(
        logp=empty.masked_scatter(valid, logp),
        entropy=empty.masked_scatter(valid, spread) if entropy else None,
    )


def _checked(
    prompts: Sequence[Sequence[int]], tokens: Int[Tensor, "B T"], length: Int[Tensor, "B"]
) -> list[int]:
    """The rows' lengths, if rows and prompts are as they must be."""
    num_rows, width = tokens.shape
    assert len(prompts) == num_rows == len(length), "one prompt and one length per row"
    counts = length.tolist()
    assert all(0 <= count <= width for count in counts), "lengths within [0, T]"
    for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        if count and not prompt:
            raise ValueError(
                f"row {row}: the prompt is empty, so nothing predicts the first completion token; "
                "give it at least one token (the BOS token, say)"
            )
    return counts


def _modules_states(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: Tensor,
    counts: list[int],
    *,
    packed: bool,
) -> Float[Tensor, "N D"]:
    """Hidden states that predict the completion tokens, by the model's own forward."""
    with taking_over():
        return (_packed_states if packed else _plain_states)(model, prompts, tokens, counts)


def _plain_states(
    model: nn.Module, prompts: Sequence[Sequence[int]], tokens: Tensor, counts: list[int]
) -> Float[Tensor, "N D"]:
    """Hidden states that predict the completion tokens, from rows padded on the right."""
    device = device_of(model)
    ids, source = pad(prompts, tokens, counts)
    with _thrifty(device):
        return padded_states(model, ids.to(device), source.to(device))


def pad(
    prompts: Sequence[Sequence[int]], tokens: Int[Tensor, "B T"], counts: Sequence[int]
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "M"]]:
    """Rows padded on the right, and the places, row by row, that predict completion tokens."""
    rows = [
        [*prompt, *tokens[row, : max(count - 1, 0)].tolist()] or [0]
        for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long)
    first = torch.tensor([row * longest + len(p) - 1 for row, p in enumerate(prompts)])
    steps = torch.arange(tokens.shape[1])
    return ids, (first[:, None] + steps)[steps < torch.tensor(counts)[:, None]]


def padded_states(
    model: nn.Module, ids: Int[Tensor, "B L"], source: Int[Tensor, "M"]
) -> Float[Tensor, "M D"]:
    """Hidden states at ``source`` of padded rows."""
    output = body(model)(input_ids=ids, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)[source]


def _packed_states(
    model: nn.Module, prompts: Sequence[Sequence[int]], tokens: Tensor, counts: list[int]
) -> Float[Tensor, "N D"]:
    """The same hidden states from one packed row, each prompt computed once."""
    device = device_of(model)
    with _thrifty(device):
        return packed_states(model, pack(prompts, tokens, counts, device=device))


def _thrifty(device: torch.device) -> AbstractContextManager[None]:
    return thrifty() if device.type == "cpu" else nullcontext()


def packed_states(model: nn.Module, packing: Packing) -> Float[Tensor, "N D"]:
    """Hidden states that predict the completion tokens of a packed row."""
    output = body(model)(
        input_ids=packing.ids[None],
        position_ids=packing.positions[None],
        # four dimensions: transformers takes it as it is, and makes no mask of N x N
        attention_mask=torch.zeros(1, 1, 1, 1, device=packing.ids.device),
        use_cache=False,
        **{PACKING: packing},
    )
    return output.last_hidden_state[0][packing.source]


def can_pack(model: nn.Module) -> bool:
    """Whether this model gives packed rows the log-probabilities of plain ones (tried, small).

    Models that mix tokens by other means than the attention function (state spaces, linear
    attention) do not, nor do models that were left on another attention implementation.
    """
    if causal(model).config._attn_implementation != NAME:
        return False
    apart = _apart(_try(model, packed=True), _try(model, packed=False))
    return apart <= _PACKED_TOLERANCE[_computed_in(model)] and not _leaks(model)


def can_fuse(model: nn.Module) -> bool:
    """Whether a fused pass gives this model's log-probabilities; for one that packs."""
    decoder = find_pass(model)
    if decoder is None:
        return False
    before = _try(model, packed=True)
    with awake(x for layer in decoder.layers for x in layer.adapters.values()) as were_asleep:
        mine, plain = (_try(model, packed=True, fused=fused) for fused in (True, False))
    missed = _apart(mine, plain)
    alike = missed <= _FUSED_TOLERANCE[_computed_in(model)]
    return alike and (not were_asleep or missed <= _MISSED * _apart(plain, before))


@torch.no_grad()
def _try(model: nn.Module, *, packed: bool, fused: bool = False) -> Float[Tensor, "5 6"]:
    """Log-probabilities of a small batch."""
    tokens = _tried(len(embedding(model)))
    with _as_computed(model):
        return completion_logp(model, _PROMPTS, tokens, _LENGTH, packed=packed, fused=fused).logp


def _apart(mine: Float[Tensor, "5 6"], other: Float[Tensor, "5 6"]) -> float:
    """The root of the mean square of differences.

    Not the largest: in bfloat16 that of one unlikely token is as large as the token is unlikely.
    """
    return float((mine - other).norm()) / int(_LENGTH.sum()) ** 0.5


def _leaks(model: nn.Module) -> bool:
    """Whether a packed completion depends on a token that the layout does not let it see.

    By a gradient: what is not looked at has one of exactly 0, which rounding cannot change.
    """
    packing = pack(
        _PROMPTS, _tried(len(embedding(model))), _LENGTH.tolist(), device=device_of(model)
    )
    embedded: list[Tensor] = []

    def watch(module: nn.Module, given: object, found: Tensor) -> Tensor:
        del module, given
        if embedded:  # asked for more than once: the first are the row's
            return found
        embedded.append(found.detach().requires_grad_())
        return embedded[0]

    handle = causal(model).get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad(), _as_computed(model):
            states = packed_states(model, packing)
    finally:
        handle.remove()
    if not embedded:  # made elsewhere, so nothing can be asked
        return False
    factors = torch.linspace(-1, 1, states.shape[1], device=states.device)
    for state in _LENGTH.cumsum(0)[[1, 4]] - 1:  # the last one of a row in either group
        (grad,) = torch.autograd.grad(states[state].float() @ factors, embedded, retain_graph=True)
        place = int(packing.source[state])
        hidden = torch.ones(len(packing.ids), dtype=torch.bool)
        for part in packing.parts:
            if part.query.start <= place < part.query.stop:
                hidden[part.key.start : part.key.stop] = False
        if bool((grad[0, hidden.to(grad.device)] != 0).any()):
            return True
    return False


def _is_mixed(model: nn.Module) -> bool:
    """Whether it runs under autocast alone: an adapter over weights that were cast to bfloat16."""
    return len({weight.dtype for weight in model.parameters()}) > 1


def _as_computed(model: nn.Module) -> AbstractContextManager[object]:
    """Within, a model computes as it was made to."""
    kind = device_of(model).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=_is_mixed(model))


def _computed_in(model: nn.Module) -> torch.dtype:
    """The type of its products."""
    return torch.bfloat16 if _is_mixed(model) else causal(model).dtype


def _tried(vocabulary: int) -> Int[Tensor, "5 6"]:
    """Tokens that a small batch is made of."""
    return (torch.arange(5 * 6).view(5, 6) * 7 + 3) % vocabulary
