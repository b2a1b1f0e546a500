"""What is not kept is made again: the same gradients, from less memory."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import gelu, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gruppo.model import load
from gruppo.model.footprint import Shape, footprint
from gruppo.model.logprob import packed_states
from gruppo.model.thrift import remade, thrifty


class Alive(TorchDispatchMode):
    """Bytes of the tensors made inside that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return made

    def without(self, *others: Tensor) -> int:
        known = {tensor.untyped_storage()._cdata for tensor in others}
        left = (
            size
            for key, (ref, size) in self._made.items()
            if not ref.expired() and key not in known
        )
        return sum(left)


def gated(x: Tensor, weights: list[Tensor]) -> Tensor:
    """A norm and a gated layer, as models have them."""
    gain, gate, up, down = weights
    normed = gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    return gelu(silu(normed @ gate) * (normed @ up), approximate="tanh") @ down


def operands() -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    shapes = [(8,), (8, 16), (8, 16), (16, 8)]
    return torch.randn(5, 8, requires_grad=True), [
        torch.randn(shape, requires_grad=True) for shape in shapes
    ]


def test_gradients_are_equal_to_the_bit_and_less_is_kept():
    x, weights = operands()
    kept, gradients = [], []
    for thrift in (False, True):
        with Alive() as alive:
            if thrift:
                with thrifty():
                    out = gated(x, weights)
            else:
                out = gated(x, weights)
        kept.append(alive.without(out, x, *weights) // 4)
        gradients.append(torch.autograd.grad(out.square().sum(), [x, *weights]))
    # numbers: 1/rms of 5 rows, twice 5 x 8 in the norm, five times 5 x 16 behind it (gate and up,
    # silu, product, gelu); of these 1/rms, gate and up are left
    assert kept == [5 + 2 * 40 + 5 * 80, 5 + 2 * 80]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_second_backward_pass_gives_the_same():
    x, weights = operands()
    with thrifty():
        loss = gated(x, weights).square().sum()
    first = torch.autograd.grad(loss, [x, *weights], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *weights])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_cannot_be_made_again_is_kept():
    x = torch.randn(3, 4, requires_grad=True)
    assert remade(x) is None
    assert remade(x @ x.T) is None
    assert remade(x * 2.0) is None  # autograd keeps neither x nor 2
    assert remade(torch.ones(4) * x) is None
    assert remade((x * x).T) is None
    found = remade((x * x).view(12))
    assert (found.node.name(), found.shape) == ("MulBackward0", (12,))


@pytest.mark.parametrize("thrift", [False, True])
def test_the_footprint_is_what_stays_alive(tiny_folder, monkeypatch, thrift):
    monkeypatch.setattr("gruppo.model.footprint.find_pass", lambda model, device: None)
    shape = Shape.even(prompts=[9, 4], group=3, completion=6)
    model: nn.Module = load(str(tiny_folder)).model.train()
    packing = shape.packed()
    with Alive() as alive:
        if thrift:
            with thrifty():
                states = packed_states(model, packing)
        else:
            states = packed_states(model, packing)
    found = footprint(str(tiny_folder), shape, thrift=thrift)
    given = [packing.ids, packing.source]  # kept too, but made before
    made = alive.without(states, packing.positions, *given, *model.parameters())
    assert found.saved == made + sum(tensor.nbytes for tensor in given)


class Fails(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("ends", ["dropped", "backward fails", "backward"])
def test_nothing_outlives_its_graph(ends):
    x, weights = operands()
    with Alive() as alive:
        with thrifty():
            loss = gated(Fails.apply(x) if ends == "backward fails" else x, weights).sum()
        if ends == "backward":
            torch.autograd.grad(loss, weights)
        if ends == "backward fails":
            with pytest.raises(RuntimeError, match="out of memory"):
                loss.backward()
            for weight in weights:
                weight.grad = None
    del loss
    gc.collect()
    assert alive.without(x, *weights) == 0


def test_a_result_changed_in_place_is_kept_as_it_is():
    a, b, w = (torch.randn(4, 4, requires_grad=True) for _ in range(3))

    def loss():
        x = a * b
        with torch.no_grad():
            x.clamp_(min=0.0)
        return (silu(x) @ w).sum()

    plain = torch.autograd.grad(loss(), [a, b, w])
    with thrifty():
        ours = loss()
    found = torch.autograd.grad(ours, [a, b, w])
    assert all(torch.equal(x, y) for x, y in zip(plain, found, strict=True))


def test_a_kept_tensor_that_was_changed_since_is_refused():
    x = torch.randn(4, 4, requires_grad=True)
    with thrifty():
        y = x @ x.T
        out = (y @ y).sum()
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an in-place operation: shape \(4, 4\)"):
        out.backward()
