"""gruppo's attention against each model's own (eager) one: prefill, decode, gradients."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from gruppo.model import completion_logp
from gruppo.model.attention import NAME, attention
from gruppo.model.source import prepare_model

SHARED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
HEAD = {"head_dim": 16}
GEMMA2 = {
    **HEAD,
    "sliding_window": 6,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 16,
}
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen2-sliding": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": HEAD,
    "mistral": {"sliding_window": 6},
    "phi3": {"sliding_window": 6},
    "gemma2": GEMMA2,
    "gemma3_text": {**HEAD, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "gpt_oss": {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}
LEFT, LENGTH = 3, 14


def build(name: str) -> nn.Module:
    torch.manual_seed(7)
    config = AutoConfig.for_model(name.partition("-")[0], **SHARED, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.float().eval()


def run(model: nn.Module) -> Tensor:
    """Logits of a left-padded prefill and of three decode steps after it."""
    ids = torch.randint(3, 120, (2, LENGTH), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    mask[0, :LEFT] = 0
    split = LENGTH - 3
    with torch.no_grad():
        out = model(input_ids=ids[:, :split], attention_mask=mask[:, :split], use_cache=True)
        logits = [out.logits[:, LEFT:]]
        for end in range(split, LENGTH):
            out = model(
                input_ids=ids[:, end : end + 1],
                attention_mask=mask[:, : end + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", MODELS)
def test_equals_eager(name: str) -> None:
    model = build(name)
    eager = run(model)
    prepare_model(model, report=print)
    assert model.config._attn_implementation == NAME
    ours = run(model)
    torch.testing.assert_close(ours, eager, rtol=0, atol=3e-5 * float(eager.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt_oss", "cohere", "granite"])
def test_log_probabilities_and_gradients_equal_eager(name: str) -> None:
    """Right padding without a mask, softcap and windows included, through the chunked head."""
    model = build(name)
    prompts, length = [[5, 6, 7], [8, 9]], torch.tensor([9, 4])
    tokens = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(9))
    expected = torch.zeros(2, 9)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([[*prompt, *tokens[row, : length[row]].tolist()]])
        full = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
        picked = full.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        expected[row, : length[row]] = picked
    wanted = torch.autograd.grad(expected.sum(), [model.get_input_embeddings().weight])[0]
    prepare_model(model, report=print)
    ours = completion_logp(model, prompts, tokens, length).logp
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(ours.sum(), [model.get_input_embeddings().weight])[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("num_keys", [1, 2, 6])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_one_query_equals_the_definition(num_keys: int, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(10)
    query = torch.randn(3, 6, 1, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 3, num_keys, 5, 8, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]).bool()[:, None, None]
    options = {} if softcap is None else {"softcap": softcap}
    out, _ = attention(nn.Identity(), query, key, value, mask, scaling=0.3, **options)
    for row in range(3):
        for head in range(6):
            shared = head // (6 // num_keys)
            scores = key[row, shared] @ query[row, head, 0] * 0.3
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            weights = torch.softmax(scores.masked_fill(~mask[row, 0, 0], -torch.inf), 0)
            expected = weights @ value[row, shared]
            torch.testing.assert_close(out[row, 0, head], expected, rtol=0, atol=1e-12)


def test_a_model_whose_logits_would_change_keeps_its_own() -> None:
    """ALiBi-like models ignore the interface or add a bias: nothing is switched behind them."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(
        "bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=120, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    before, told = run(model), []
    prepare_model(model, report=told.append)
    torch.testing.assert_close(run(model), before, rtol=0, atol=1e-6)
    assert model.config._attn_implementation != NAME
    assert told == ["attention: this model keeps its own implementation (ours gives other logits)"]
