"""The kernels of a training pass equal plain torch, forward and backward."""

import pytest
import torch
from torch import Tensor, nn

from gruppo import native

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler here")
KINDS = [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)]


def close(mine: Tensor, other: Tensor, bound: float) -> bool:
    return bool((mine.double() - other.double()).abs().max() <= bound * other.abs().max().double())


@pytest.mark.parametrize("width", [5, 64, 576])
@pytest.mark.parametrize(("dtype", "bound"), KINDS)
def test_norm(dtype, bound, width):
    torch.manual_seed(0)
    hidden = torch.randn(7, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, dtype=torch.float64, requires_grad=True)
    update, grad = torch.randn(2, 7, width).to(dtype)
    carry = torch.randn(7, width)
    narrow = hidden.detach().float(), weight.detach().float()
    total, out, scale = native.norm_forward(
        narrow[0], update, weight=narrow[1], epsilon=0.3, dtype=dtype
    )
    summed = hidden + update.double()
    expected = nn.functional.rms_norm(summed, (width,), weight, 0.3)
    assert close(total, summed.detach(), 1e-6)
    assert close(out, expected.detach(), bound)
    wanted = torch.autograd.grad((expected * grad.double()).sum(), [summed, weight])
    back, rounded, again, weight_grad = native.norm_backward(
        total, narrow[1], scale=scale, grad=grad, carry=carry
    )
    assert close(back, wanted[0] + carry, 3e-6)
    assert torch.equal(rounded, back.to(dtype))
    assert close(again, out, bound)
    assert close(weight_grad, wanted[1], 3e-6)


def test_norm_without_an_update_takes_the_hidden_state_itself():
    hidden = torch.randn(3, 8)
    total, out, _ = native.norm_forward(
        hidden, None, weight=torch.ones(8), epsilon=1e-6, dtype=torch.float32
    )
    assert total is hidden
    assert close(out, nn.functional.rms_norm(hidden, (8,), eps=1e-6), 1e-6)


@pytest.mark.parametrize(("dtype", "bound"), KINDS)
def test_swiglu(dtype, bound):
    torch.manual_seed(0)
    gates = (torch.randn(9, 38) * 4).to(dtype)
    grad = torch.randn(9, 19).to(dtype)
    wide = gates.double().requires_grad_()
    gate, up = wide.chunk(2, dim=1)
    expected = nn.functional.silu(gate) * up
    (wanted,) = torch.autograd.grad((expected * grad.double()).sum(), [wide])
    gradient, again = native.swiglu_backward(gates, grad)
    assert close(gradient, wanted, bound)
    assert close(again, native.swiglu(gates), bound)
    assert close(again, expected.detach(), bound)


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of heads [N, H, D], as transformers writes it."""
    low, high = x.chunk(2, dim=-1)
    return x * cosine[:, None] + torch.cat([-high, low], -1) * sine[:, None]


@pytest.mark.parametrize(("repeats", "width"), [(1, 8), (3, 64), (2, 6)])
@pytest.mark.parametrize(("dtype", "bound"), KINDS)
def test_heads(dtype, bound, repeats, width):
    torch.manual_seed(0)
    heads, rows = 2, 5
    packed = torch.randn(rows, heads * (repeats + 2) * width).to(dtype)
    cosine, sine = torch.randn(2, rows, width)  # both halves differ, as they may
    wide = packed.double().requires_grad_()
    each = wide.unflatten(1, (-1, width))
    query, key, value = each.split([heads * repeats, heads, heads], dim=1)
    expected = [
        turned(query, cosine.double(), sine.double())
        .unflatten(1, (heads, repeats))
        .transpose(0, 1),
        turned(key, cosine.double(), sine.double()).transpose(0, 1),
        value.transpose(0, 1),
    ]
    got = native.split_heads(packed, cosine, sine, key_heads=heads)
    for mine, other in zip(got, expected, strict=True):
        assert close(mine, other.detach(), bound)
    grads = [torch.randn(tensor.shape) for tensor in got]
    loss = sum((e * g.double()).sum() for e, g in zip(expected, grads, strict=True))
    (wanted,) = torch.autograd.grad(loss, [wide])
    assert close(native.join_heads(*grads, cosine, sine, dtype=dtype), wanted, bound)


def test_sums_over_rows_do_not_change_from_call_to_call():
    torch.manual_seed(0)
    hidden, carry = torch.randn(2, 301, 64)
    grad = torch.randn(301, 64)
    _, _, scale = native.norm_forward(
        hidden, None, weight=torch.ones(64), epsilon=1e-6, dtype=torch.float32
    )
    torch.set_num_threads(3)  # the fixture of all tests sets one again
    first, second = (
        native.norm_backward(hidden, torch.ones(64), scale=scale, grad=grad, carry=carry)[3]
        for _ in range(2)
    )
    assert torch.equal(first, second)
    unit = hidden.double() * scale.double()[:, None]
    assert close(first, (grad.double() * unit).sum(0), 3e-6)
