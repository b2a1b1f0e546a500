"""Packed groups give the log-probabilities and gradients of plain padded rows, on many models."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gruppo.model.adapter import Lora, attach
from gruppo.model.attention import adopt
from gruppo.model.logprob import can_pack, completion_logp
from gruppo.model.packing import pack

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
SHAPES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": MOE,
    "mistral": {"sliding_window": 6},
    "phi3": {},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "olmo2": {},
}
PROMPTS = [(5, 6, 7, 8, 9)] * 3 + [(11, 12)] * 2 + [(13, 14, 15)] * 2
LENGTH = torch.tensor([7, 1, 4, 3, 8, 0, 1])


def tiny(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY, **SHAPES[kind]))
    assert adopt(model.eval())
    return model


def tokens():
    return torch.randint(1, 97, (7, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_packed_equals_plain_in_value_and_gradient(kind):
    model = tiny(kind)
    assert can_pack(model)
    seen = []
    for packed in (False, True):
        model.zero_grad()
        scored = completion_logp(
            model, PROMPTS, tokens(), LENGTH, temperature=0.7, entropy=True, packed=packed
        )
        weight = torch.linspace(-1, 1, scored.logp.numel()).view_as(scored.logp)
        (weight * scored.logp).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        seen.append((scored.logp.detach(), scored.entropy.detach(), grads))
    for plain, packed in zip(*seen, strict=True):
        assert (plain - packed).abs().max() <= 1e-5 * max(1.0, plain.abs().max())


def test_an_adapter_over_weights_in_bfloat16_can_be_packed():
    pytest.importorskip("peft")
    model = attach(tiny("llama"), Lora(rank=2), compute_dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32, torch.bfloat16}
    assert can_pack(model)


def test_a_model_on_another_attention_is_not_packed():
    model = tiny("llama")
    model.set_attn_implementation("sdpa")
    assert not can_pack(model)


def test_the_layout_of_two_groups():
    packing = pack(
        [(1, 2, 3), (1, 2, 3), (4,)], torch.tensor([[7, 8, 9], [6, 0, 0], [5, 5, 0]]), [3, 1, 2]
    )
    # the last token of each completion is left out
    assert packing.ids.tolist() == [1, 2, 3, 7, 8, 4, 5]
    assert packing.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert packing.source.tolist() == [2, 3, 4, 2, 5, 6]
    assert [(g.start, g.stop) for g in packing.groups] == [(0, 3), (5, 6)]
    assert packing.groups[0].filled.tolist() == [0, 1]


def test_a_model_whose_completions_see_each_other_is_not_packed():
    """It mixes neighbours by a convolution; with an adapter in bfloat16, too."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    kinds = {"layer_types": ["conv", "full_attention"]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **TINY, **kinds))
    assert adopt(model.eval())
    assert not can_pack(model)
    assert not can_pack(attach(model, Lora(rank=2), compute_dtype=torch.bfloat16))
