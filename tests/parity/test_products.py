"""Products by other libraries equal torch's: values, gradients, and what is left to torch."""

import pytest
import torch
from torch import nn

from gruppo import native
from gruppo.model import (
    Lora,
    attach,
    choosing,
    faster_products,
    load,
    multiplying,
    products,
    summing,
    timed_products,
)
from gruppo.model.joint import give_products
from gruppo.policy import Optim, Policy
from gruppo.recipe import build
from gruppo.recipe.build import pin
from gruppo.recipe.recipe import ModelSection

PROMPTS = [(5, 6, 7), (5, 6, 7), (8, 9)]
TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0], [1, 2, 0, 0]])
LENGTH = torch.tensor([4, 3, 2])


OTHERS = ["onednn", "native"]


@pytest.fixture
def made(monkeypatch):
    """Shapes of the products that oneDNN and the own kernels make."""
    shapes = []

    def spied(multiply):
        def spy(left, right, *rest, **options):
            inner = right.shape[0] if isinstance(right, torch.Tensor) else right.columns
            shapes.append((*left.shape, inner))
            return multiply(left, right, *rest, **options)

        return spy

    assert products.can_choose("onednn", torch.float32)
    monkeypatch.setitem(products.MULTIPLY, "onednn", spied(products._onednn))
    monkeypatch.setattr(native, "multiply", spied(native.multiply))
    return shapes


def needs(library):
    if library != "torch" and not products.can_choose(library, torch.float32):
        pytest.skip(f"no {library} products here")


def loss_and_gradients(folder, library, *, lora=None):
    torch.manual_seed(0)
    model = load(str(folder)).model
    if lora is not None:
        model = attach(model, lora, compute_dtype=torch.float32)
    policy = Policy(model, optim=Optim(), total_updates=1, products=library)
    scored = policy.logp(PROMPTS, TOKENS, LENGTH, entropy=True)
    loss = scored.logp.sum() + 0.3 * scored.entropy.sum()
    policy.backward(loss)
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("library", OTHERS)
def test_training_gives_the_same_gradient(tiny_folder, made, library):
    needs(library)
    value, gradients = loss_and_gradients(tiny_folder, "torch")
    assert made == []
    ours, found = loss_and_gradients(tiny_folder, library)
    assert ours == pytest.approx(value, rel=1e-6)
    assert gradients.keys() == found.keys()
    for name, expected in gradients.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    # of each layer's matrices the output and two gradients, the input's and the weight's; those
    # that read the same rows are joint where there are kernels
    matrices = 4 if native.kernels() is not None else 7
    per_layer = 3 * matrices if library == "onednn" else 2 * matrices + 7  # a gradient a weight
    assert len([shape for shape in made if 258 not in shape]) == per_layer * 2
    of_head = sorted({shape for shape in made if 258 in shape})
    assert of_head == [(9, 32, 258), (9, 258, 32), (258, 9, 32)]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("library", OTHERS)
@pytest.mark.parametrize("targets", [("all-linear",), ("lm_head", "q_proj")])
def test_an_adapter_too(tiny_folder, made, targets, library):
    """One on the head as well, which is made again in the backward pass."""
    pytest.importorskip("peft")
    needs(library)
    lora = Lora(rank=2, alpha=4, targets=targets)
    value, gradients = loss_and_gradients(tiny_folder, "torch", lora=lora)
    ours, found = loss_and_gradients(tiny_folder, library, lora=lora)
    assert ours == pytest.approx(value, rel=1e-6)
    for name, expected in gradients.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    assert len(made) > len(gradients)


@pytest.mark.parametrize("library", ["torch", *OTHERS])
def test_gradients_of_several_passes_add_up(tiny_folder, library):
    """The second one is added as it is made, to what the first has left."""
    needs(library)
    found = []
    for parts in ([slice(0, 3)], [slice(0, 2), slice(2, 3), slice(0, 1)]):
        torch.manual_seed(0)
        policy = Policy(
            load(str(tiny_folder)).model, optim=Optim(), total_updates=1, products=library
        )
        for part in parts:
            scored = policy.logp(PROMPTS[part], TOKENS[part], LENGTH[part], entropy=False)
            # the first row twice in the second case: once here and once alone
            policy.backward(scored.logp.sum())
        if len(parts) == 1:
            scored = policy.logp(PROMPTS[:1], TOKENS[:1], LENGTH[:1], entropy=False)
            policy.backward(scored.logp.sum())
        found.append({n: p.grad.clone() for n, p in policy.model.named_parameters()})
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", ["torch", *OTHERS])
@pytest.mark.parametrize("there", [None, "rows", "columns", "half", "hooked"])
def test_a_gradient_is_added_whatever_lies_there(library, there):
    needs(library)
    torch.manual_seed(0)
    half = there == "half"
    weights = [nn.Parameter(torch.randn(rows, 4).to(torch.bfloat16 if half else torch.float32))
               for rows in (6, 3, 5)]  # fmt: skip
    before = [torch.randn_like(weight) for weight in weights]
    for weight, grad in zip(weights, before, strict=True):
        if there is not None:
            weight.grad = grad.t().contiguous().t() if there == "columns" else grad.clone()
        if there == "hooked":
            weight.register_hook(lambda grad: None)
    grad, rows = torch.randn(7, 14), torch.randn(7, 4)
    with summing(), choosing(library):
        given = give_products(weights, [True, False, True], grad=grad, rows=rows)
    expected = (grad.double().t() @ rows.double()).split([6, 3, 5])
    bound = 0.02 if half else 1e-5
    for index, (weight, start) in enumerate(zip(weights, before, strict=True)):
        start = torch.zeros_like(start) if there is None else start
        if index == 1:  # not wanted
            assert given[1] is None
            wanted = start
        elif there == "hooked":  # autograd adds it, after the hook
            torch.testing.assert_close(given[index].double(), expected[index], rtol=0, atol=1e-5)
            wanted = start
        else:
            assert given[index] is None
            wanted = start.double() + expected[index]
        found = torch.zeros_like(start) if weight.grad is None else weight.grad
        assert float((found.double() - wanted.double()).abs().max()) <= bound * 8


@pytest.mark.parametrize("library", OTHERS)
def test_a_bias_that_torch_would_spread_is_torchs(made, library):
    needs(library)
    rows, weight = torch.ones(2, 5), torch.ones(3, 5)
    with multiplying(library):
        spread = nn.functional.linear(rows, weight, torch.ones(1))
    assert torch.equal(spread, torch.full((2, 3), 6.0))
    assert made == []


@pytest.mark.usefixtures("unchecked")
def test_what_multiplies_must_be_known(tiny_folder):
    with pytest.raises(ValueError, match="products = 'blas' must be one of 'torch', 'onednn'"):
        Policy(load(str(tiny_folder)).model, optim=Optim(), total_updates=1, products="blas")


@pytest.mark.parametrize("library", OTHERS)
def test_a_layer_of_three_dimensions_with_bias(made, library):
    needs(library)
    torch.manual_seed(1)
    layer = nn.Linear(5, 3)
    rows = torch.randn(2, 4, 5, requires_grad=True)
    weight = torch.randn(2, 4, 3)
    expected = torch.autograd.grad((layer(rows) * weight).sum(), [rows, *layer.parameters()])
    with multiplying(library):
        out = layer(rows)
        found = torch.autograd.grad((out * weight).sum(), [rows, *layer.parameters()])
    torch.testing.assert_close(out, layer(rows), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert made == [(8, 5, 3), (8, 3, 5), (3, 8, 5)]


@pytest.mark.parametrize("library", OTHERS)
def test_a_single_row_of_one_dimension_is_torchs(made, library):
    layer = nn.Linear(5, 3)
    with multiplying(library):
        assert torch.equal(layer(torch.ones(5)), layer(torch.ones(5)))
    assert made == []


@pytest.mark.parametrize("library", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_alone(made, dtype, library):
    layer = nn.Linear(5, 3, dtype=dtype)
    rows = torch.ones(2, 5, dtype=dtype)
    plain = layer(rows)
    with multiplying(library):
        assert torch.equal(layer(rows), plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert nn.Linear(5, 3)(torch.ones(2, 5)).dtype == torch.bfloat16
        batched = torch.ones(2, 3, 4) @ torch.ones(2, 4, 5)
        assert torch.equal(batched, torch.full((2, 3, 5), 4.0))
        assert torch.equal(torch.ones(0, 4) @ torch.ones(4, 5), torch.ones(0, 5))
    assert made == []


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ((9, 6), "onednn"),
        ((9, 8.4), "torch"),  # less than 15 %
        ((9, 8.4, 8.9), "native"),
        ((9, 6, 8), "onednn"),
        ((9, 9.9, 9.1), "torch"),
    ],
)
def test_the_fastest_library_is_chosen(monkeypatch, tmp_path, seconds, chosen):
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path))
    there = ("torch", "onednn", "native")[: len(seconds)]
    monkeypatch.setattr(timed_products, "can_choose", lambda kind, dtype: kind in there)
    monkeypatch.setattr(timed_products, "fastest", lambda works, repeats: list(seconds))
    timed_products._measured.cache_clear()
    try:
        assert faster_products("cpu", torch.float32) == chosen
        assert faster_products("cuda", torch.float32) == "torch"
        monkeypatch.setattr(
            timed_products, "fastest", lambda works, repeats: list(reversed(seconds))
        )
        timed_products._measured.cache_clear()  # the next process
        assert faster_products("cpu", torch.float32) == chosen
    finally:
        timed_products._measured.cache_clear()


def test_every_library_is_really_timed(monkeypatch, tmp_path):
    """With the shapes that training has; the answer is one of those that are there."""
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path))
    timed_products._measured.cache_clear()
    try:
        for compute in (torch.float32, torch.bfloat16):
            there = {"torch", *(kind for kind in OTHERS if products.can_choose(kind, compute))}
            assert faster_products("cpu", compute) in there
    finally:
        timed_products._measured.cache_clear()


def test_where_others_cannot_be_had_it_is_torch(monkeypatch, made):
    for asks in (products, timed_products):
        monkeypatch.setattr(asks, "can_choose", lambda kind, compute: False)
    with multiplying("native"):
        assert products.current_products() == "torch"
        assert torch.equal(nn.Linear(2, 3, bias=False)(torch.zeros(1, 2)), torch.zeros(1, 3))
    assert made == []
    assert faster_products("cpu", torch.float32) == "torch"


@pytest.mark.parametrize(
    ("chosen", "here", "told"),
    [
        ("torch", True, ""),
        ("onednn", True, " by oneDNN"),
        ("native", True, " by own kernels"),
        ("native", False, ' by torch (products = "native" cannot be had here in that type)'),
    ],
)
def test_what_multiplies_is_told(monkeypatch, chosen, here, told):
    monkeypatch.setattr(build, "can_choose", lambda kind, compute: here)
    assert build._told(chosen, "cpu", torch.float32) == told
    assert build._told(chosen, "cuda:0", torch.float32) == ""


@pytest.mark.parametrize("library", OTHERS)
def test_not_with_checkpointing(tiny_folder, library):
    with pytest.raises(
        ValueError, match=f'products = "{library}" with gradient_checkpointing = true'
    ):
        ModelSection(name="x", products=library, gradient_checkpointing=True)
    model = load(str(tiny_folder), gradient_checkpointing=True).model
    with pytest.raises(ValueError, match=f"products = '{library}' with a model of gradient"):
        Policy(model, optim=Optim(), total_updates=1, products=library)
    section = ModelSection(name="x", device="cpu", compute="float32", gradient_checkpointing=True)
    assert pin(section).products == "torch"
