"""Drawing tokens: keyed uniforms and the processed sampling distribution.

A sampled token is a pure function of the logits and of one uniform number, and that number is a
hash of (request key, sample index, position). So what is drawn depends neither on the batch a row
happens to be in, nor on the order of the rows, nor on any generator's state.

On the CPU a compiled kernel draws where there is one. This module knows no model and no request; it
does not penalise repetition, because that changes the distribution without the trainer's
log-probabilities knowing of it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from gruppo import native
from gruppo.types import Sampling

# Constants of the SplitMix64 finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom
# number generators", OOPSLA 2014): the golden-ratio increment and two multipliers.
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_WORD = (1 << 64) - 1

_BLOCK = 128  # tokens summed together before the inverse CDF looks inside one block
_CANDIDATES = 512  # largest probabilities looked at before top-p falls back to a full sort

_BROKEN = (
    "logits hold NaN or inf, so no token can be drawn; the model's weights are broken or its "
    "compute type overflows: check the last update, or use float32"
)


def _signed(word: int) -> int:
    """The 64-bit pattern ``word`` as torch's signed integer."""
    return word - (1 << 64) if word >> 63 else word


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical (unsigned) shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 finaliser: a bijection of 64-bit words in which every input bit matters."""
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    """The same as ``_mix`` on one Python integer."""
    x = ((x ^ (x >> 30)) * _FIRST) & _WORD
    x = ((x ^ (x >> 27)) * _SECOND) & _WORD
    return x ^ (x >> 31)


def stream(key: tuple[int, ...], sample: int) -> int:
    """Hash a request key and a sample index into the 64-bit name of a row's random stream.

    Args:
        key: the request's key; each number is taken modulo 2^64.
        sample: index of the completion among the request's ``num_samples``.

    Returns:
        A signed 64-bit integer, to be collected into a tensor for ``uniforms``.
    """
    state = _mix_int((len(key) + _GAMMA) & _WORD)  # so that (1,) and (1, 0) differ
    for part in (*key, sample):
        state = _mix_int((state + _GAMMA + (part & _WORD)) & _WORD)
    return _signed(state)


def uniforms(streams: Int[Tensor, "N"], positions: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """One number in [0, 1) for each row at its position, in float64 (52 random bits).

    Args:
        streams: [N] from ``stream``.
        positions: [N] index of the token to draw within its completion.
    """
    word = _mix(streams ^ _mix(positions + _signed(_GAMMA)))
    return _shift(word, 12).to(torch.float64) * 2.0**-52


def keyed_uniform(key: tuple[int, ...], sample: int, position: int) -> float:
    """The uniform that draws token ``position`` of completion ``sample`` of a request.

    >>> keyed_uniform((0, 1, 2), 3, 4) == keyed_uniform((0, 1, 2), 3, 4)
    True
    >>> keyed_uniform((0, 1, 2), 3, 4) == keyed_uniform((0, 1, 2), 3, 5)
    False
    """
    row = torch.tensor([stream(key, sample)])
    return float(uniforms(row, torch.tensor([position])))


def sample(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, "N"], sampling: Sampling
) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
    """Draw one token a row, and its log-probability under the distribution it was drawn from.

    The logits are cast to float32, divided by the temperature, then filtered by top-k, top-p (of
    what top-k left) and min-p (relative to the likeliest token), and renormalised:
    ``logp = log pi(v) - log sum_{w kept} pi(w)``. Tokens that tie with the last one a filter keeps
    are kept too, so that the kept set does not depend on the order of equal values. At temperature
    0 the distribution is the point mass on the likeliest token (the lowest id among equals): its
    log-probability is 0.

    Args:
        logits: [N, V] in any floating type; ``-inf`` excludes a token.
        uniform: [N] numbers in [0, 1), float64.
        sampling: temperature, top_k, top_p and min_p; the rest is not looked at.

    Returns:
        Token ids [N] and natural-log probabilities [N] in float32.

    Raises:
        FloatingPointError: if a row of logits holds NaN or +inf.

    >>> from gruppo.types import Sampling
    >>> logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    >>> half = Sampling(max_tokens=1, top_p=0.75)
    >>> token, logp = sample(logits, torch.tensor([0.7], dtype=torch.float64), half)
    >>> int(token), round(float(logp), 4)  # 0.3 / (0.5 + 0.3)
    (1, -0.9808)
    """
    if not native.can_sample(logits):
        return sample_plainly(logits, uniform, sampling)
    drawn = native.sample(logits, uniform, sampling)
    if drawn is None:
        raise FloatingPointError(_BROKEN)
    return drawn


def sample_plainly(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, "N"], sampling: Sampling
) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
    """The same as ``sample`` in torch alone: any device and type; what the kernel must equal."""
    if sampling.temperature == 0:
        _require_finite(logits.amax(-1))
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    scaled = logits.float()
    if sampling.temperature != 1:
        scaled = scaled / sampling.temperature
    probs = scaled.softmax(-1)
    if sampling.top_k and sampling.top_k < probs.shape[-1]:
        probs = _at_least(probs, probs.topk(sampling.top_k, dim=-1).values[:, -1:])
    if sampling.top_p < 1:
        probs = _at_least(probs, _nucleus(probs, sampling.top_p))
    if sampling.min_p > 0:
        probs = _at_least(probs, sampling.min_p * probs.amax(-1, keepdim=True))
    return _invert(probs, uniform)


def _require_finite(row: Tensor) -> None:
    """Refuse rows whose distribution is not one."""
    if not bool(row.isfinite().all()):
        raise FloatingPointError(_BROKEN)


def _at_least(probs: Tensor, threshold: Tensor) -> Tensor:
    """``probs`` [N, V] where they reach ``threshold`` [N, 1], else 0."""
    return torch.where(probs >= threshold, probs, 0.0)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Threshold [N, 1]: the last value of the smallest prefix whose share reaches ``top_p``."""
    need = top_p * probs.sum(-1, keepdim=True, dtype=torch.float64)
    # A full sort of a large vocabulary costs more than a decode step of a small model; the nucleus
    # nearly always lies among the largest few hundred.
    ranked = probs.topk(min(_CANDIDATES, probs.shape[-1]), dim=-1).values
    reached = ranked.cumsum(-1, dtype=torch.float64)
    if bool((reached[:, -1:] < need).any()):
        ranked = probs.sort(dim=-1, descending=True).values
        reached = ranked.cumsum(-1, dtype=torch.float64)
    last = (reached < need).sum(-1, keepdim=True).clamp(max=ranked.shape[-1] - 1)
    return ranked.gather(-1, last)


def _invert(probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF of unnormalised ``probs`` [N, V] at ``uniform`` [N], in two levels.

    Block sums first, then inside the one block that holds the point: a cumulative sum over the
    whole vocabulary is slower and, in float32, biased towards its end.
    """
    width = probs.shape[-1]
    blocks = F.pad(probs, (0, -width % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    edges = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # [N, V / block]
    total = edges[:, -1:]
    _require_finite(total)
    point = uniform[:, None] * total
    block = torch.searchsorted(edges, point, right=True)  # first edge beyond the point
    before = torch.where(block > 0, edges.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK)).squeeze(1)
    inner = inside.cumsum(-1, dtype=torch.float64)
    # Rounding may put the point at the block's end; just below it, the token found has mass.
    rest = torch.minimum(point - before, inner[:, -1:] * (1 - 2.0**-52))
    token = block * _BLOCK + torch.searchsorted(inner, rest, right=True)
    drawn = probs.gather(-1, token).to(torch.float64)
    return token.squeeze(-1), (drawn.log() - total.log()).squeeze(-1).float()
