"""Activations kept from sampling: a training pass over them gives what it gives without."""

import pytest
import torch

from gruppo import native
from gruppo.model.activations import _firsts
from gruppo.model.packing import pack
from support.kept import PROMPTS, Drawn, draw, opened, outcome
from support.passes import adapted, build, gap, needs_kernels

pytestmark = needs_kernels


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "adapter"])
def test_log_probabilities_and_gradients(name):
    model, activations = adapted(rank=3) if name == "adapter" else build(name), opened()
    drawn = draw(model, activations)
    assert len(set(drawn.counts)) > 3, "they end at different steps"
    known = drawn.known(activations, model)
    assert known is not None
    assert len(known.rest) == PROMPTS
    assert activations.num_tokens == sum(count - 1 for count in drawn.counts)
    assert sorted(set(known.at.tolist())) == list(range(activations.num_tokens))
    mine, plain = outcome(model, drawn, activations), outcome(model, drawn, None)
    assert gap(mine, plain) < 2e-5


def test_they_are_what_is_computed_with():
    """Of results that are no numbers nothing that is one can come."""
    model, activations = build("llama"), opened()
    drawn = draw(model, activations)
    known = drawn.known(activations, model)
    for layer in known.results:
        layer[2].fill_(torch.nan)  # gates: needed on the way back alone
    found = outcome(model, drawn, activations)
    assert not found["logp"].isnan().any()
    assert found["model.layers.0.mlp.gate_proj.weight"].isnan().all()
    for layer in known.results:
        layer[3].fill_(torch.nan)
    logp = outcome(model, drawn, activations)["logp"]
    first = torch.arange(logp.shape[1]) == 0  # what a prompt predicts is not known
    assert not logp[:, first].isnan().any()
    read = torch.arange(logp.shape[1]) < torch.tensor(drawn.counts)[:, None]
    assert logp[read & ~first].isnan().all()


def test_what_is_drawn_does_not_depend_on_it():
    model, activations = build("llama"), opened()
    drawn, plain = draw(model, activations), draw(model, None)
    assert drawn.completions == plain.completions


@pytest.mark.parametrize("tokens", [0, 1, 23, 60])
def test_where_room_ends_the_rest_is_computed(tokens):
    """By float32 numbers a token: 2 layers of 64 + 32 + 96 + 32."""
    model = build("llama")
    activations = opened(tokens * 2 * (64 + 32 + 96 + 32) * 4)
    drawn = draw(model, activations)
    assert tokens - 4 < activations.num_tokens <= tokens, "rows come together"
    known = drawn.known(activations, model)
    assert (known is None) == (activations.num_tokens == 0)
    if known is not None:
        assert len(known.at) - len(known.rest) == activations.num_tokens
    assert gap(outcome(model, drawn, activations), outcome(model, drawn, None)) < 2e-5


def test_some_completions_beside_others():
    """A row of one that was drawn and another of the same group that was not."""
    model, activations = build("llama"), opened()
    drawn = draw(model, activations)
    tokens = drawn.tokens.clone()
    tokens[1] = (tokens[1] + 1) % 97
    other = Drawn(drawn.prompts, tokens, drawn.counts, [])
    known, packing = other.known(activations, model), pack(other.prompts, tokens, other.counts)
    strange = _firsts(packing)[1]
    assert len(known.rest) == PROMPTS + drawn.counts[1] - 1
    assert strange in known.rest
    assert gap(outcome(model, other, activations), outcome(model, other, None)) < 2e-5


def test_in_bfloat16_the_policy_is_the_one_that_has_drawn():
    """All that rounds otherwise is left out: what is trained says what the engine said."""
    if not native.can_multiply(torch.bfloat16):
        pytest.skip("no native bfloat16 products here")
    model, activations = build("llama"), opened()
    drawn = draw(model, activations, compute_dtype=torch.bfloat16)
    told = torch.zeros(drawn.tokens.shape)
    for row, completion in enumerate(drawn.completions):
        told[row, : len(completion.tokens)] = torch.tensor(completion.logp)
    later = torch.arange(told.shape[1]) > 0
    mine, plain = (
        (outcome(model, drawn, kept, half=True)["logp"] - told)[:, later].abs().max()
        for kept in (activations, None)
    )
    assert plain > 1e-3
    assert mine < plain / 3


def test_another_type_of_products_is_not_taken():
    model, activations = build("llama"), opened()
    drawn = draw(model, activations)
    assert torch.equal(
        outcome(model, drawn, activations, half=True)["logp"],
        outcome(model, drawn, None, half=True)["logp"],
    )


def test_several_calls_of_a_step_add_up():
    """As for groups that are drawn again; equal completions are known by the longer part."""
    model, activations = build("llama"), opened()
    first, second = draw(model, activations), draw(model, activations)
    total = sum(count - 1 for count in first.counts)
    assert activations.num_tokens == 2 * total
    assert len(second.known(activations, model).rest) == PROMPTS
    activations.add(first.prompts[0], first.completions[0].tokens, [0])
    assert len(first.known(activations, model).rest) == PROMPTS
