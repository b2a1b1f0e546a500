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
