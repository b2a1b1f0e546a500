"""A training pass in few calls a layer gives the model's own values and gradients."""

import pytest
import torch
from torch import Tensor

from gruppo.model import can_fuse, can_pack, completion_logp, multiplying
from gruppo.model.decoder_pass import find_pass
from gruppo.model.precision import cast_frozen
from gruppo.model.source import checkpoint_activations
from gruppo.native import compiled as building
from gruppo.policy import Optim, Policy
from support.passes import (
    LENGTHS,
    PROMPTS,
    assert_rounds_like_autocast,
    build,
    gap,
    needs_kernels,
    outcome,
)


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])  # biases; norms of heads
@pytest.mark.parametrize("products", ["torch", "onednn", "native"])
def test_values_and_gradients(name, products):
    model = build(name)
    assert can_pack(model)
    assert can_fuse(model)
    with multiplying(products):
        assert gap(outcome(model, fused=True), outcome(model, fused=False)) < 2e-5


@needs_kernels
@pytest.mark.parametrize("products", ["torch", "native"])
def test_a_single_key_head_with_a_norm(products):
    model = build("qwen3", num_key_value_heads=1, head_dim=16)
    assert can_fuse(model)
    with multiplying(products):
        assert gap(outcome(model, fused=True), outcome(model, fused=False)) < 2e-5


@needs_kernels
@pytest.mark.parametrize("products", ["torch", "native"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_is_as_far_from_float32_as_autocast_is(products, name):
    model = build(name)
    assert_rounds_like_autocast(model, outcome(model, fused=False), products)


@needs_kernels
def test_frozen_weights_get_no_gradient():
    model = build("qwen2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name and "k_proj" not in name)
    mine, other = outcome(model, fused=True), outcome(model, fused=False)
    assert "model.layers.1.self_attn.q_proj.bias" in mine
    assert "model.layers.1.self_attn.k_proj.weight" not in mine
    assert gap(mine, other) < 2e-5


@needs_kernels
def test_a_frozen_reference_with_cast_matrices():
    """Its linear layers are bfloat16, all else float32; as under autocast with float32 weights."""
    model = build("llama").requires_grad_(False)
    tokens = torch.randint(0, 60, (7, 6))
    found = []
    for cast in (False, True):
        if cast:
            cast_frozen(model, torch.bfloat16)
        assert find_pass(model) is not None
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            scored = completion_logp(model, PROMPTS, tokens, LENGTHS, packed=True, fused=True)
        found.append(scored.logp)
    assert torch.equal(*found)


@needs_kernels
def test_what_is_not_like_it_goes_the_plain_way():
    assert find_pass(build("mistral", sliding_window=6)) is None
    dropping = build("llama")
    dropping.config.attention_dropout = 0.1
    assert find_pass(dropping) is None
    assert find_pass(build("llama").double()) is None
    assert find_pass(build("granite")) is None  # factors of its own in modules of the same names
    for hook in ("register_forward_hook", "register_full_backward_hook"):
        hooked = build("llama")
        getattr(hooked.model.layers[0].mlp, hook)(lambda *_: None)
        assert find_pass(hooked) is None
    with torch.autocast("cpu", torch.float16):
        assert find_pass(build("llama")) is None
    twice = build("llama")
    twice.model.layers[0].self_attn.v_proj.weight = twice.model.layers[0].self_attn.k_proj.weight
    assert find_pass(twice) is None


@needs_kernels
def test_what_computes_otherwise_is_found_out(monkeypatch):
    model = build("llama")
    real = type(model.model.layers[0].mlp).forward
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda s, x: real(s, x) * 1.2)
    assert can_pack(model)
    assert find_pass(model) is not None
    assert not can_fuse(model)


@needs_kernels
def test_a_scaling_of_its_own_is_taken_over():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9
    assert can_fuse(model)
    assert gap(outcome(model, fused=True), outcome(model, fused=False)) < 2e-5


@needs_kernels
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("prompts", "lengths"),
    [([(7,)] * 3, [6, 2, 1]), ([(7, 8), (7, 8), (9,)], [0, 0, 0]), ([(7,), (8,)], [1, 6])],
    ids=["one group, a prompt of one token", "nothing to train", "groups of one"],
)
def test_edges(tied, prompts, lengths):
    model = build("llama", tie_word_embeddings=tied)
    rows = torch.randint(0, 60, (len(prompts), 6)), torch.tensor(lengths)
    found = []
    for fused in (True, False):
        model.zero_grad()
        logp = completion_logp(model, prompts, *rows, packed=True, fused=fused).logp
        (logp.square().sum() + 0.0 * model.lm_head.weight.sum()).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"logp": logp.detach()} | grads)
    mine, other = found
    for name, expected in other.items():
        # a parameter without a gradient on one way has one of zero on the other
        got = mine.get(name, torch.zeros_like(expected))
        assert (got - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max()))


@needs_kernels
@pytest.mark.parametrize("fused", [True, False])
def test_a_weight_changed_before_the_backward_pass_is_noticed(fused):
    model = build("llama")
    scored = completion_logp(
        model, PROMPTS, torch.randint(0, 60, (7, 6)), LENGTHS, packed=True, fused=fused
    )
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an in-?place"):
        scored.logp.sum().backward()


@needs_kernels
def test_copies_of_matrices_go_with_their_layers_backward_pass():
    """A layer keeps seven tensors and its nine parameters; then the parameters' gradients alone."""
    model = build("llama")
    scored = completion_logp(
        model, PROMPTS, torch.randint(0, 60, (7, 6)), LENGTHS, packed=True, fused=True
    )
    node = scored.logp.grad_fn
    while node is not None and node.name() != "_LayerBackward":
        node = next((n for n, _ in node.next_functions if n is not None), None)
    assert node is not None
    assert len(node.saved_tensors) == 7 + 9
    assert all(one is two for one, two in zip(node.saved_tensors[7:], node.parameters, strict=True))
    scored.logp.sum().backward()
    with pytest.raises(RuntimeError, match="have already been freed"):
        _ = node.saved_tensors
    assert not [value for value in vars(node).values() if isinstance(value, Tensor)]


@needs_kernels
def test_the_policy_takes_it_unless_layers_are_recomputed(monkeypatch):
    taken: list[bool] = []
    real = completion_logp

    def watched(*arguments: object, fused: bool, **options: object) -> object:
        taken.append(fused)
        return real(*arguments, fused=fused, **options)

    monkeypatch.setattr("gruppo.policy.policy.completion_logp", watched)
    model = build("llama")
    tokens = torch.randint(0, 60, (7, 6))
    policy = Policy(model, optim=Optim(), total_updates=1)
    policy.logp(PROMPTS, tokens, LENGTHS)
    checkpoint_activations(model)
    assert find_pass(model) is None  # for a policy that was made before, too
    Policy(model, optim=Optim(), total_updates=1).logp(PROMPTS, tokens, LENGTHS)
    assert taken == [True, False]


def test_without_a_compiler_it_is_not_taken(monkeypatch):
    monkeypatch.setenv("GRUPPO_NATIVE", "0")
    building.kernels.cache_clear()
    try:
        model = build("llama")
        assert find_pass(model) is None
        assert gap(outcome(model, fused=True), outcome(model, fused=False)) == 0.0
    finally:
        building.kernels.cache_clear()
