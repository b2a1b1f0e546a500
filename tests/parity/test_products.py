"""Products by oneDNN equal torch's: values, gradients, and where torch's are left alone."""

import pytest
import torch
from torch import nn

from gruppo import native
from gruppo.model import Lora, attach, faster_products, load, multiplying, products
from gruppo.policy import Optim, Policy
from gruppo.recipe.build import pin
from gruppo.recipe.recipe import ModelSection

PROMPTS = [(5, 6, 7), (5, 6, 7), (8, 9)]
TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0], [1, 2, 0, 0]])
LENGTH = torch.tensor([4, 3, 2])


@pytest.fixture
def made(monkeypatch):
    """Shapes of the products that oneDNN makes."""
    shapes = []
    assert products._is_there()
    multiply = products._multiply

    def spy(left, right, bias=None):
        shapes.append((*left.shape, right.shape[0]))
        return multiply(left, right, bias)

    monkeypatch.setattr(products, "_multiply", spy)
    return shapes


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


def test_training_gives_the_same_gradient(tiny_folder, made):
    value, gradients = loss_and_gradients(tiny_folder, "torch")
    assert made == []
    ours, found = loss_and_gradients(tiny_folder, "onednn")
    assert ours == pytest.approx(value, rel=1e-6)
    assert gradients.keys() == found.keys()
    for name, expected in gradients.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    # of each layer's matrices the output and two gradients, the input's and the weight's; those
    # that read the same rows are joint where there are kernels
    matrices = 4 if native.kernels() is not None else 7
    assert len([shape for shape in made if 258 not in shape]) == 3 * matrices * 2
    of_head = sorted({shape for shape in made if 258 in shape})
    assert of_head == [(9, 32, 258), (9, 258, 32), (258, 9, 32)]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("targets", [("all-linear",), ("lm_head", "q_proj")])
def test_an_adapter_too(tiny_folder, made, targets):
    """One on the head as well, which is made again in the backward pass."""
    pytest.importorskip("peft")
    lora = Lora(rank=2, alpha=4, targets=targets)
    value, gradients = loss_and_gradients(tiny_folder, "torch", lora=lora)
    ours, found = loss_and_gradients(tiny_folder, "onednn", lora=lora)
    assert ours == pytest.approx(value, rel=1e-6)
    for name, expected in gradients.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    assert len(made) > len(gradients)


def test_a_layer_of_three_dimensions_with_bias(made):
    torch.manual_seed(1)
    layer = nn.Linear(5, 3)
    rows = torch.randn(2, 4, 5, requires_grad=True)
    weight = torch.randn(2, 4, 3)
    expected = torch.autograd.grad((layer(rows) * weight).sum(), [rows, *layer.parameters()])
    with multiplying("onednn"):
        out = layer(rows)
        found = torch.autograd.grad((out * weight).sum(), [rows, *layer.parameters()])
    torch.testing.assert_close(out, layer(rows), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert made == [(8, 5, 3), (8, 3, 5), (3, 8, 5)]


def test_a_single_row_of_one_dimension_is_torchs(made):
    layer = nn.Linear(5, 3)
    with multiplying("onednn"):
        assert torch.equal(layer(torch.ones(5)), layer(torch.ones(5)))
    assert made == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_alone(made, dtype):
    layer = nn.Linear(5, 3, dtype=dtype)
    rows = torch.ones(2, 5, dtype=dtype)
    plain = layer(rows)
    with multiplying("onednn"):
        assert torch.equal(layer(rows), plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert nn.Linear(5, 3)(torch.ones(2, 5)).dtype == torch.bfloat16
        batched = torch.ones(2, 3, 4) @ torch.ones(2, 4, 5)
        assert torch.equal(batched, torch.full((2, 3, 5), 4.0))
        assert torch.equal(torch.ones(0, 4) @ torch.ones(4, 5), torch.ones(0, 5))
    assert made == []


@pytest.mark.parametrize(("seconds", "chosen"), [((9, 6), "onednn"), ((9, 8.4), "torch")])
def test_the_faster_library_is_chosen(monkeypatch, tmp_path, seconds, chosen):
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path))
    monkeypatch.setattr(products, "fastest", lambda works, repeats: list(seconds))
    products._measured.cache_clear()
    try:
        assert faster_products("cpu", torch.float32) == chosen
        assert faster_products("cuda", torch.float32) == "torch"
        monkeypatch.setattr(products, "fastest", lambda works, repeats: list(reversed(seconds)))
        products._measured.cache_clear()  # the next process
        assert faster_products("cpu", torch.float32) == chosen
    finally:
        products._measured.cache_clear()


def test_not_with_checkpointing(tiny_folder):
    with pytest.raises(ValueError, match='products = "onednn" with gradient_checkpointing = true'):
        ModelSection(name="x", products="onednn", gradient_checkpointing=True)
    model = load(str(tiny_folder), gradient_checkpointing=True).model
    with pytest.raises(ValueError, match="products = 'onednn' with a model of gradient"):
        Policy(model, optim=Optim(), total_updates=1, products="onednn")
    section = ModelSection(name="x", device="cpu", compute="float32", gradient_checkpointing=True)
    assert pin(section).products == "torch"
