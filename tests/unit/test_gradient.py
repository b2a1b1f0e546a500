"""Weights' copies are kept as long as they hold; gradients are added in place, and are the same."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gruppo import dist
from gruppo.model.attention import adopt
from gruppo.model.casts import Casts
from gruppo.model.gradient import give, give_rows, summing
from gruppo.policy import Optim, Policy
from support.engines import TINY


def llama(**config: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **config}))
    assert adopt(model)
    return model


def test_a_copy_is_made_once_and_anew_after_a_change():
    one, other = torch.ones(2, 3), torch.full((1, 3), 2.0)
    casts = Casts()
    made = casts.of([one, other], torch.bfloat16)
    assert made.tolist() == [[1, 1, 1], [1, 1, 1], [2, 2, 2]]
    assert casts.of([one, other], torch.bfloat16) is made
    assert casts.of([one, other], torch.float32).dtype == torch.float32
    other.mul_(2)
    assert casts.of([one, other], torch.bfloat16)[2].tolist() == [4, 4, 4]
    made = casts.of([one, other], torch.bfloat16)
    casts.clear()
    assert casts.of([one, other], torch.bfloat16) is not made


def test_no_copy_of_what_needs_none():
    weight = torch.ones(2, 3)
    assert Casts().of([weight], torch.float32).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_given_adds_up(dtype):
    weight = nn.Parameter(torch.zeros(2, 3))
    part = torch.tensor([[1.0, 2, 3], [4, 5, 6]], dtype=dtype)
    with summing():
        assert give(weight, part.clone()) is None
        assert give(weight, part) is None
        assert give_rows(weight, torch.tensor([1, 1]), part) is None
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert weight.grad.tolist() == [[2, 4, 6], [13, 17, 21]]


def test_without_its_caller_s_word_autograd_gets_the_gradient():
    weight, part = nn.Parameter(torch.zeros(2, 3)), torch.ones(2, 3, dtype=torch.bfloat16)
    given = give(weight, part)
    rows = give_rows(weight, torch.tensor([1, 1]), part)
    assert weight.grad is None
    assert given is not None
    assert given.dtype == torch.float32
    assert rows is not None
    assert rows.tolist() == [[0, 0, 0], [2, 2, 2]]


def test_a_weight_with_a_hook_is_left_to_autograd():
    weight = nn.Parameter(torch.zeros(2))
    weight.register_hook(lambda grad: grad * 2)
    with summing():
        assert give(weight, torch.ones(2)) is not None
    assert weight.grad is None


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_policy_sums_up_what_autograd_would(monkeypatch, compute):
    """Three passes, added in place and by autograd: the same but for the order of the sums."""
    grads = []
    for ranks in (1, 2):  # in company, wrappers wait for autograd's own accumulation
        monkeypatch.setattr(dist, "world_size", lambda ranks=ranks: ranks)
        policy = Policy(
            llama(tie_word_embeddings=True), optim=Optim(), total_updates=1, compute_dtype=compute
        )
        for number in range(3):
            tokens = (torch.arange(8).view(2, 4) * (number + 3)) % 60
            scored = policy.logp([(5, 6, 7)] * 2, tokens, torch.tensor([4, 3]))
            policy.backward(scored.logp.sum() * (number + 1))
        grads.append({name: p.grad for name, p in policy.model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        other = grads[1][name]
        assert (grad - other).abs().max() <= 2e-6 * other.abs().max() + 1e-7, name


def trained(policy: Policy) -> dict[str, torch.Tensor | None]:
    """Gradients of two completions of the prompt 5 6 7."""
    tokens = torch.tensor([[9, 8, 11, 3], [12, 9, 4, 4]])
    policy.backward(policy.logp([(5, 6, 7)] * 2, tokens, torch.tensor([4, 3])).logp.sum())
    return {name: p.grad for name, p in policy.model.named_parameters()}


def test_the_padding_token_s_embedding_is_not_trained():
    """It stands in the prompt; 5 beside it is trained."""
    model = llama(tie_word_embeddings=False, pad_token_id=6)
    grad = trained(Policy(model, optim=Optim(), total_updates=1))["model.embed_tokens.weight"]
    assert grad is not None
    assert grad[5].norm() > 1e-4
    assert not grad[6].any()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_weights_saved_elsewhere_get_their_gradient(compute):
    """``save_on_cpu`` gives the backward pass other tensors than the weights."""
    grads = []
    for saving in (nullcontext(), torch.autograd.graph.save_on_cpu()):
        policy = Policy(llama(), optim=Optim(), total_updates=1, compute_dtype=compute)
        with saving:
            grads.append(trained(policy))
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_a_weight_that_lies_otherwise_is_left_to_autograd():
    weight = nn.Parameter(torch.zeros(3, 2).t())
    with summing():
        assert give(weight, torch.ones(2, 3)) is not None
    assert weight.grad is None
