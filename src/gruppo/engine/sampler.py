"""Drawing tokens: keyed uniforms and the processed sampling distribution.

A sampled token is a pure function of the logits and of one uniform number, and that number is a
hash of (request key, sample index, position). So what is drawn depends neither on the batch a row
happens to be in, nor on the order of the rows, nor on any generator's state.

On the CPU a compiled kernel draws where there is one. This module knows no model and no request; it
does not penalise repetition, because that changes the distribution without the trainer's
log-probabilities knowing of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
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
    token, logp, _ = draw(logits, uniform, sampling)
    return token, logp


def draw(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, "N"], sampling: Sampling
) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"], Told]:
    """As ``sample``; and the same on the host, by a compiled kernel where there is one.

    Raises:
        FloatingPointError: if a row of logits holds NaN or +inf.
    """
    if not native.can_sample(logits):
        return draw_plainly(logits, uniform, sampling)
    drawn = native.sample(logits, uniform, sampling)
    if drawn is None:
        raise FloatingPointError(_BROKEN)
    token, logp = drawn
    return token, logp, Told(token=token.tolist(), logp=logp.tolist(), is_exact=True)


def draw_plainly(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, "N"], sampling: Sampling
) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"], Told]:
    """The same in torch alone: any device and type; what the kernel must equal.

    It waits for the device once (twice in the rare case that top-p needs a full sort).
    """
    picked = pick(logits, uniform, sampling)
    told = picked.told()
    if not told.is_exact:
        picked = pick(logits, uniform, sampling, is_exact=True)
        told = picked.told()
    return picked.token, picked.logp, told


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pick:
    """What was drawn, on the device, before anything is known of it on the host.

    ``is_sound``: the logits held neither NaN nor +inf. ``is_exact``: the candidates looked at
    held every nucleus. Where one of them is False, the tokens mean nothing (but are ids).
    """

    token: Int[Tensor, "N"]
    logp: Float[Tensor, "N"]
    is_sound: Bool[Tensor, ""]
    is_exact: Bool[Tensor, ""]

    def told(self) -> Told:
        """All of it on the host, by one copy.

        Raises:
            FloatingPointError: the logits were not sound.
        """
        # float64 holds every token id and every float32 as it is
        parts = (self.is_sound[None], self.is_exact[None], self.token, self.logp)
        sound, exact, *rest = torch.cat([part.to(torch.float64) for part in parts]).tolist()
        if not sound:
            raise FloatingPointError(_BROKEN)
        count = len(self.token)
        return Told(
            token=[int(token) for token in rest[:count]], logp=rest[count:], is_exact=bool(exact)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A ``Pick`` on the host."""

    token: list[int]
    logp: list[float]
    is_exact: bool


def pick(
    logits: Float[Tensor, "N V"],
    uniform: Float[Tensor, "N"],
    sampling: Sampling,
    *,
    is_exact: bool = False,
) -> Pick:
    """Draw as ``sample`` does, without ever waiting for the device.

    ``is_exact``: look at all tokens for the nucleus (a full sort), not at the likeliest alone.
    """
    whole = torch.ones((), dtype=torch.bool, device=logits.device)
    if sampling.temperature == 0:
        sound = logits.amax(-1).isfinite().all()
        none = torch.zeros(len(logits), device=logits.device)
        return Pick(token=logits.argmax(-1), logp=none, is_sound=sound, is_exact=whole)
    scaled = logits.float()
    if sampling.temperature != 1:
        scaled = scaled / sampling.temperature
    probs = scaled.softmax(-1)
    if sampling.top_k and sampling.top_k < probs.shape[-1]:
        probs = _at_least(probs, probs.topk(sampling.top_k, dim=-1).values[:, -1:])
    if sampling.top_p < 1:
        threshold, whole = _nucleus(probs, sampling.top_p, is_exact=is_exact)
        probs = _at_least(probs, threshold)
    if sampling.min_p > 0:
        probs = _at_least(probs, sampling.min_p * probs.amax(-1, keepdim=True))
    token, logp, sound = _invert(probs, uniform)
    return Pick(token=token, logp=logp, is_sound=sound, is_exact=whole)


def _at_least(probs: Tensor, threshold: Tensor) -> Tensor:
    """``probs`` [N, V] where they reach ``threshold`` [N, 1], else 0."""
    return torch.where(probs >= threshold, probs, 0.0)


def _nucleus(probs: Tensor, top_p: float, *, is_exact: bool) -> tuple[Tensor, Tensor]:
    """Threshold [N, 1]: the last value of the smallest prefix whose share reaches ``top_p``.

    And whether the values looked at reached it in every row.
    """
    need = top_p * probs.sum(-1, keepdim=True, dtype=torch.float64)
    # A full sort of a large vocabulary costs more than a decode step of a small model; the nucleus
    # nearly always lies among the largest few hundred.
    width = probs.shape[-1]
    if is_exact:
        ranked = probs.sort(dim=-1, descending=True).values
    else:
        ranked = probs.topk(min(_CANDIDATES, width), dim=-1).values
    reached = ranked.cumsum(-1, dtype=torch.float64)
    short = (reached[:, -1:] < need).any()
    if ranked.shape[-1] == width:
        short = torch.zeros_like(short)  # all there is; the rest is rounding
    last = (reached < need).sum(-1, keepdim=True).clamp(max=ranked.shape[-1] - 1)
    return ranked.gather(-1, last), ~short


def _invert(probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse CDF of unnormalised ``probs`` [N, V] at ``uniform`` [N], in two levels.

    Block sums first, then inside the one block that holds the point: a cumulative sum over the
    whole vocabulary is slower and, in float32, biased towards its end. Last comes whether all rows
    are distributions.
    """
    width = probs.shape[-1]
    blocks = F.pad(probs, (0, -width % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    edges = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # [N, V / block]
    total = edges[:, -1:]
    point = uniform[:, None] * total
    block = torch.searchsorted(edges, point, right=True)  # first edge beyond the point
    # The bounds change nothing of a distribution; NaN would index beyond the end, which a GPU
    # does not survive.
    block = block.clamp(max=edges.shape[-1] - 1)
    before = torch.where(block > 0, edges.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK)).squeeze(1)
    inner = inside.cumsum(-1, dtype=torch.float64)
    # Rounding may put the point at the block's end; just below it, the token found has mass.
    rest = torch.minimum(point - before, inner[:, -1:] * (1 - 2.0**-52))
    token = block * _BLOCK + torch.searchsorted(inner, rest, right=True)
    token = token.clamp(max=width - 1)
    drawn = probs.gather(-1, token).to(torch.float64)
    logp = (drawn.log() - total.log()).squeeze(-1).float()
    # a filter leaves nothing of a row of NaN
    return token.squeeze(-1), logp, (total.isfinite() & (total > 0)).all()
