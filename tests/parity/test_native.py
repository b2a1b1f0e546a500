"""The compiled kernels equal plain torch."""

import pytest
import torch
from torch import Tensor

from gruppo import native
from gruppo.native import compiled as building

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler here")


def expected(
    query: Tensor, keys: list[Tensor], values: list[Tensor], *, scaling: float, window: int | None
) -> Tensor:
    """Attention row by row in float64: row n over keys[n] [K, S, D]."""
    rows = []
    for q, k, v in zip(query.double(), keys, values, strict=True):
        k, v = (x.double() if window is None else x.double()[:, -window:] for x in (k, v))
        heads = q.view(len(k), -1, q.shape[-1])
        rows.append((torch.softmax(heads @ k.mT * scaling, -1) @ v).flatten(0, 1))
    return torch.stack(rows)


@needs_kernels
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("width", [8, 64, 70, 128])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
def test_decode_attention(dtype: torch.dtype, bound: float, width: int, window: int | None) -> None:
    torch.manual_seed(0)
    query = torch.randn(7, 6, width).to(dtype)
    prompt_keys, prompt_values = torch.randn(2, 3, 2, 11, width).to(dtype)
    own_keys, own_values = torch.randn(2, 9, 2, 13, width).to(dtype)
    place = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    prompt_length = torch.tensor([11, 4, 7])[place]
    own_length = torch.tensor([0, 1, 2, 5, 12, 7, 3])
    keys, values = (
        [
            torch.cat([prompt[p, :, :n], own[row, :, : m + 1]], dim=1)
            for row, (p, n, m) in enumerate(zip(place, prompt_length, own_length, strict=True))
        ]
        for prompt, own in ((prompt_keys, own_keys), (prompt_values, own_values))
    )
    got = native.decode_attention(
        query,
        prompt_keys,
        prompt_values,
        own_keys,
        own_values,
        place=place,
        prompt_length=prompt_length,
        own_length=own_length,
        scaling=0.3,
        window=window,
    )
    wanted = expected(query, keys, values, scaling=0.3, window=window)
    assert (got.double() - wanted).abs().max() < bound


def softmax_case(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(rows, width) * 6
    return logits, torch.randint(0, width, (rows,)), torch.randn(2, rows)


@needs_kernels
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.5])
@pytest.mark.parametrize(("rows", "width"), [(7, 5003), (1, 1), (3, 2048), (2, 13)])
def test_softmax_in_value_and_gradient(rows: int, width: int, scale: float) -> None:
    """Against float64, entropy with and without a gradient of its own."""
    logits, tokens, given = softmax_case(rows, width)
    raw = logits.double().requires_grad_()
    full = torch.log_softmax(raw * scale, -1)
    wanted = full.gather(1, tokens[:, None])[:, 0], -(full.exp() * full).sum(-1)
    lse = torch.logsumexp(raw.detach() * scale, -1)
    logp, found_lse, entropy = native.pick(logits, tokens, scale=scale, entropy=True)
    assert (logp - wanted[0]).abs().max() < 3e-6 * max(1.0, float(logp.abs().max()))
    assert (found_lse - lse).abs().max() < 1e-6 * max(1.0, float(lse.abs().max()))
    assert (entropy - wanted[1]).abs().max() < 2e-6
    bare = native.pick(logits, tokens, scale=scale, entropy=False)
    assert torch.equal(bare[0], logp)
    assert bare[2].abs().max() == 0
    for used in (False, True):
        loss = (given[0] * wanted[0]).sum() + (given[1] * wanted[1]).sum() * used
        (gradient,) = torch.autograd.grad(loss, raw, retain_graph=True)
        made = native.pick_gradient_(
            logits.clone(),
            tokens,
            scale=scale,
            lse=found_lse,
            entropy=entropy,
            grad_logp=given[0],
            grad_entropy=given[1] if used else None,
        )
        assert (made - gradient).abs().max() < 2e-6 + 4e-7 * float(lse.abs().max())


@needs_kernels
def test_softmax_of_impossible_and_of_broken_logits() -> None:
    """-inf is a probability of 0, wherever it stands; NaN is not hidden."""
    logits, tokens, given = softmax_case(4, 5000)
    possible = torch.ones(5000, dtype=torch.bool)
    possible[:2100] = possible[3000:3010] = False  # the whole first block of the kernel
    tokens = torch.tensor([2500, 4999, 2100, 3500])
    logits[:, ~possible] = -torch.inf
    logp, lse, entropy = native.pick(logits, tokens, scale=1.0, entropy=True)
    full = torch.log_softmax(logits[:, possible].double(), -1)
    places = possible.cumsum(0)[tokens] - 1
    assert (logp - full.gather(1, places[:, None])[:, 0]).abs().max() < 5e-6
    assert (entropy + (full.exp() * full).sum(-1)).abs().max() < 2e-6
    made = native.pick_gradient_(
        logits.clone(),
        tokens,
        scale=1.0,
        lse=lse,
        entropy=entropy,
        grad_logp=given[0],
        grad_entropy=given[1],
    )
    assert made[:, ~possible].abs().max() == 0
    assert torch.isfinite(made).all()
    logits[1, 7] = torch.nan  # among -inf
    logits[2, 4000] = torch.nan
    logits[3] = -torch.inf
    broken = native.pick(logits, tokens, scale=1.0, entropy=True)
    assert [value.isnan().tolist() for value in broken] == [
        [False, True, True, True],
        [False, True, True, False],
        [False, True, True, True],
    ]


def test_softmax_is_for_float32_alone() -> None:
    assert not native.has_softmax(torch.zeros(1, 2, dtype=torch.float64))
    assert not native.has_softmax(torch.zeros(1, 2, dtype=torch.bfloat16))


def test_no_compiler_means_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_COMPILERS", ("no-such-compiler",))
    building.kernels.cache_clear()
    try:
        assert building.kernels() is None
        assert not native.is_supported(torch.zeros(1))
    finally:
        building.kernels.cache_clear()


def test_turned_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRUPPO_NATIVE", "0")
    building.kernels.cache_clear()
    try:
        assert building.kernels() is None
    finally:
        building.kernels.cache_clear()
