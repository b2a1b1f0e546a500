"""The kernels of a decode step equal what transformers computes in torch."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from gruppo import native
from gruppo.engine.sampler import draw_plainly, sample
from gruppo.types import Sampling

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler here")

SINGLE, HALF = torch.float32, torch.bfloat16
# one unit in the last place of numbers below 8 in bfloat16, where sums are rounded at the end
BOUND = {SINGLE: 2e-6, HALF: 2.0**-6}


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert float((got.double() - wanted.double()).abs().max()) <= BOUND[got.dtype]


@pytest.mark.parametrize("width", [32, 70, 576])
@pytest.mark.parametrize(("stream", "dtype"), [(SINGLE, SINGLE), (SINGLE, HALF), (HALF, HALF)])
def test_add_norm(stream: torch.dtype, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    hidden, update = torch.randn(5, width).to(stream), torch.randn(5, width).to(dtype)
    norm = Qwen3RMSNorm(width, eps=1e-3)
    nn.init.normal_(norm.weight)
    norm = norm.to(stream)
    summed = hidden + update
    weight = norm.weight.detach().float()
    assert_close(
        native.add_norm(hidden.clone(), None, weight, epsilon=1e-3, dtype=dtype),
        norm(hidden).to(dtype).detach(),
    )
    got = native.add_norm(hidden, update, weight, epsilon=1e-3, dtype=dtype)
    assert torch.equal(hidden, summed)
    assert_close(got, norm(summed).to(dtype).detach())


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_swiglu(dtype: torch.dtype) -> None:
    gate = torch.cat([torch.linspace(-100, 100, 401), torch.linspace(-2, 2, 400)]).to(dtype)
    up = torch.linspace(0.01, 1, 801).to(dtype)
    got = native.swiglu(torch.stack([torch.cat([gate, up]), torch.cat([up, gate])]))
    for row, wanted in zip(
        got, (nn.functional.silu(gate) * up, nn.functional.silu(up) * gate), strict=True
    ):
        assert torch.allclose(row, wanted, rtol=1e-6 if dtype == SINGLE else 2.0**-7, atol=1e-7)


@pytest.mark.parametrize("width", [8, 64, 70])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_rotate_and_keep(dtype: torch.dtype, normed: bool, width: int) -> None:
    torch.manual_seed(0)
    rows, heads, key_heads = 5, 6, 2
    packed = torch.randn(rows, (heads + 2 * key_heads) * width).to(dtype)
    angles = torch.randn(rows, width // 2).repeat(1, 2)
    cosine, sine = angles.cos(), angles.sin()
    norms = [Qwen3RMSNorm(width, eps=1e-3) for _ in range(2)]
    for norm in norms:
        nn.init.normal_(norm.weight)
    states = packed.view(rows, 1, -1, width).transpose(1, 2).split([heads, key_heads, key_heads], 1)
    query, key, value = states
    if normed:
        query, key = (norm(state).detach() for norm, state in zip(norms, states[:2], strict=True))
    query, key = apply_rotary_pos_emb(query, key, cosine[:, None], sine[:, None])
    own_keys, own_values = torch.zeros(2, 7, key_heads, 9, width, dtype=dtype)
    own_length = torch.tensor([0, 8, 3, 3, 1])
    got = native.rotate_and_keep(
        packed,
        cosine,
        sine,
        norms=tuple((norm.weight.detach(), 1e-3) if normed else None for norm in norms),
        own_length=own_length,
        own_keys=own_keys,
        own_values=own_values,
    )
    assert_close(got, query[:, :, 0].to(dtype))
    at = (torch.arange(rows), slice(None), own_length)
    assert_close(own_keys[at], key[:, :, 0].to(dtype))
    assert torch.equal(own_values[at], value[:, :, 0])
    for buffer in (own_keys, own_values):
        assert int((buffer != 0).any(-1).sum()) == rows * key_heads  # and nothing else is written


SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 40, "temperature": 1.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 0.9},
]


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_drawing(settings: dict[str, float], dtype: torch.dtype) -> None:
    """Flat and peaked rows, some tokens excluded, points up to the very end of the interval.

    In bfloat16 many logits tie, so that what a filter keeps of equal ones shows.
    """
    torch.manual_seed(0)
    logits = torch.randn(400, 3001) * torch.linspace(0.01, 6, 400)[:, None]
    logits[::3, 200:700] = -math.inf
    logits = logits.to(dtype)
    uniform = torch.rand(400, dtype=torch.float64)
    uniform[:40], uniform[40:80] = 0.0, 1 - 2.0**-52
    sampling = Sampling(max_tokens=1, **settings)
    token, logp = sample(logits, uniform, sampling)
    wanted, wanted_logp, _ = draw_plainly(logits, uniform, sampling)
    # rounding at an interval's boundary: then it is the next token with mass
    same = token == wanted
    assert int((~same).sum()) <= 2
    assert torch.allclose(logp[same], wanted_logp[same], rtol=0, atol=1e-5)
    assert int((logits.gather(-1, token[:, None]) == -math.inf).sum()) == 0


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits(bad: float, temperature: float, dtype: torch.dtype) -> None:
    """One NaN or +inf among 300 numbers, or a row of -inf alone."""
    logits = torch.zeros(3, 300, dtype=dtype)
    logits[1, slice(None) if bad == -math.inf else 250] = bad
    for draw in (sample, draw_plainly):
        with pytest.raises(FloatingPointError, match="logits hold NaN or inf"):
            draw(
                logits,
                torch.full((3,), 0.5, dtype=torch.float64),
                Sampling(max_tokens=1, temperature=temperature),
            )


def test_the_lowest_of_equal_logits_is_the_greedy_token() -> None:
    logits = torch.zeros(2, 300)
    logits[0, [140, 7, 299]] = 1.0
    token, logp = sample(logits, torch.zeros(2).double(), Sampling(max_tokens=1, temperature=0.0))
    assert (token.tolist(), logp.tolist()) == ([7, 0], [0.0, 0.0])
