"""completion_logp against a naive computation over the whole [B, T, V] logits."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from gruppo.model import Scored, completion_logp
from gruppo.model.head import token_logp
from gruppo.model.rule import LogitRule
from gruppo.model.source import checkpoint_activations, prepare_model

PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
LENGTHS = torch.tensor([4, 2, 0, 5])


def tiny(*, tied: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    prepare_model(model, report=print)
    return model


def some_tokens(width: int = 5) -> Tensor:
    return torch.randint(0, 61, (4, width), generator=torch.Generator().manual_seed(2))


def naive(model: nn.Module, tokens: Tensor, temperature: float) -> Scored:
    """One row at a time, no padding, all logits."""
    shape = (len(PROMPTS), tokens.shape[1])
    logp, entropy = [torch.zeros(shape, dtype=next(model.parameters()).dtype) for _ in range(2)]
    for row, prompt in enumerate(PROMPTS):
        for t in range(int(LENGTHS[row])):
            ids = torch.tensor([[*prompt, *tokens[row, :t].tolist()]])
            full = torch.log_softmax(model(input_ids=ids).logits[0, -1] / temperature, -1)
            logp[row, t] = full[tokens[row, t]]
            entropy[row, t] = -(full.exp() * full).sum()
    return Scored(logp=logp, entropy=entropy)


def weighted(scored: Scored) -> Tensor:
    """A scalar in which every position of both outputs has its own weight."""
    weights = torch.linspace(-1, 2, scored.logp.numel()).view_as(scored.logp).to(scored.logp)
    return (weights * scored.logp).sum() + (weights.flip(0) * scored.entropy).sum()


@pytest.mark.parametrize("chunk", [1, 3, 512])
@pytest.mark.parametrize("tied", [True, False])
def test_values_and_gradients_equal_full_logits(chunk: int, tied: bool) -> None:
    model, tokens = tiny(tied=tied), some_tokens()
    ours = completion_logp(
        model, PROMPTS, tokens, LENGTHS, temperature=0.7, entropy=True, chunk=chunk
    )
    theirs = naive(model, tokens, 0.7)
    torch.testing.assert_close(ours.logp, theirs.logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=0, atol=1e-5)
    parameters = list(model.parameters())
    got = torch.autograd.grad(weighted(ours), parameters)
    wanted = torch.autograd.grad(weighted(theirs), parameters)
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_entropy_is_off_by_default() -> None:
    scored = completion_logp(tiny(), PROMPTS, some_tokens(), LENGTHS)
    assert scored.entropy is None
    assert scored.logp.dtype == torch.float32


def test_uniform_logits_give_log_of_the_vocabulary() -> None:
    model = tiny(tied=False)
    nn.init.zeros_(model.get_output_embeddings().weight)
    scored = completion_logp(model, PROMPTS, some_tokens(), LENGTHS, entropy=True)
    expected = torch.where(
        torch.arange(5) < LENGTHS[:, None], torch.tensor(61.0).log(), torch.tensor(0.0)
    )
    torch.testing.assert_close(scored.logp, -expected)
    torch.testing.assert_close(scored.entropy, expected)


def test_padding_does_not_matter() -> None:
    """Wider tensors, other garbage beyond the length, other rows beside: the same numbers."""
    model, tokens = tiny(dtype=torch.float64), some_tokens()
    whole = completion_logp(model, PROMPTS, tokens, LENGTHS).logp
    garbage = torch.cat([tokens, torch.full((4, 3), 60)], 1)
    garbage = torch.where(torch.arange(8) < LENGTHS[:, None], garbage, 60 - garbage)
    wide = completion_logp(model, PROMPTS, garbage, LENGTHS).logp
    torch.testing.assert_close(wide[:, :5], whole, rtol=0, atol=1e-12)
    assert wide[:, 5:].abs().max() == 0
    alone = completion_logp(model, PROMPTS[1:2], tokens[1:2], LENGTHS[1:2]).logp
    torch.testing.assert_close(alone[0], whole[1], rtol=0, atol=1e-12)


def test_row_splits_add_up_to_the_whole_gradient() -> None:
    model, tokens = tiny(dtype=torch.float64), some_tokens()
    weights = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def gradient(rows: list[int]) -> list[Tensor]:
        scored = completion_logp(
            model, [PROMPTS[r] for r in rows], tokens[rows], LENGTHS[rows], temperature=1.3
        )
        loss = (weights[rows] * scored.logp).sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    whole = gradient([0, 1, 2, 3])
    for split in ([[0], [1], [2], [3]], [[3, 1], [2, 0]], [[0, 1, 2], [3]]):
        sums = [sum(parts) for parts in zip(*map(gradient, split), strict=True)]
        for mine, other in zip(sums, whole, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prompts", [[[4, 5], [6]], [[], []]])
def test_empty_completions_give_zeros_and_zero_gradient(prompts: list[list[int]]) -> None:
    model = tiny()
    scored = completion_logp(
        model, prompts, torch.full((2, 3), 9), torch.tensor([0, 0]), entropy=True
    )
    assert torch.equal(scored.logp, torch.zeros(2, 3))
    (scored.logp.sum() + scored.entropy.sum()).backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_empty_row_beside_full_ones_has_no_part_in_the_gradient() -> None:
    model, tokens = tiny(dtype=torch.float64), some_tokens()
    keep = [0, 1, 3]
    whole = completion_logp(model, PROMPTS, tokens, LENGTHS).logp.sum()
    without = completion_logp(
        model, [PROMPTS[r] for r in keep], tokens[keep], LENGTHS[keep]
    ).logp.sum()
    pairs = zip(
        torch.autograd.grad(whole, list(model.parameters())),
        torch.autograd.grad(without, list(model.parameters())),
        strict=True,
    )
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1: the prompt is empty"):
        completion_logp(tiny(), [[1], []], some_tokens()[:2], torch.tensor([1, 1]))


def test_temperature_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature = 0.0 must be positive"):
        completion_logp(tiny(), PROMPTS, some_tokens(), LENGTHS, temperature=0.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_fused_head_equals_autograd(bias: bool, softcap: float | None) -> None:
    """Scale, soft cap, bias and temperature together, values and all three gradients."""
    torch.manual_seed(4)
    head = nn.Linear(6, 11, bias=bias, dtype=torch.float64)
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 11, (7,))
    rule = LogitRule(scale=4.0, softcap=softcap, temperature=0.7)
    logp, entropy = token_logp(head, hidden, tokens, rule=rule, entropy=True, chunk=3)
    z = head(hidden) * 4.0
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    full = torch.log_softmax(z / 0.7, -1)
    expected = full.gather(1, tokens[:, None])[:, 0], -(full.exp() * full).sum(-1)
    torch.testing.assert_close(logp, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, expected[1], rtol=0, atol=1e-12)
    weights = torch.randn(2, 7, dtype=torch.float64)
    wanted = [hidden, *head.parameters()]
    mine = torch.autograd.grad((weights[0] * logp + weights[1] * entropy).sum(), wanted)
    loss = (weights[0] * expected[0] + weights[1] * expected[1]).sum()
    for got, other in zip(mine, torch.autograd.grad(loss, wanted), strict=True):
        torch.testing.assert_close(got, other, rtol=0, atol=1e-11)


def test_head_that_is_no_plain_linear_layer_is_called_as_it_is() -> None:
    torch.manual_seed(5)
    linear = nn.Linear(6, 11, dtype=torch.float64)
    wrapped = nn.Sequential(linear)
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 11, (7,))
    rule = LogitRule(softcap=2.0, temperature=1.5)
    options = {"rule": rule, "entropy": True, "chunk": 2}
    fused = token_logp(linear, hidden, tokens, **options)
    plain = token_logp(wrapped, hidden, tokens, **options)
    wanted = [hidden, *linear.parameters()]
    gradients = [torch.autograd.grad((a + 2 * b).sum(), wanted) for a, b in (fused, plain)]
    for one, other in zip([*fused, *gradients[0]], [*plain, *gradients[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrap", [nn.Identity, nn.Sequential], ids=["fused", "plain"])
def test_an_entropy_that_is_only_logged_leaves_the_gradient_alone(wrap) -> None:
    """To the bit; an entropy that was not asked for is 0 and has no gradient either."""
    torch.manual_seed(6)
    linear = nn.Linear(6, 11, dtype=torch.float64)
    head = linear if wrap is nn.Identity else wrap(linear)
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    tokens, wanted = torch.randint(0, 11, (7,)), [hidden, *linear.parameters()]
    found = []
    for entropy, use in ((True, False), (False, False), (False, True)):
        logp, spread = token_logp(
            head, hidden, tokens, rule=LogitRule(temperature=0.7), entropy=entropy, chunk=3
        )
        assert (spread.min() > 1.0) if entropy else (spread.abs().max() == 0.0)
        loss = logp.square().sum() + (spread.sum() if use else 0.0)
        found.append(torch.autograd.grad(loss, wanted))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_autocast_products_are_bfloat16_and_softmax_is_not() -> None:
    model, tokens = tiny(), some_tokens()
    exact = completion_logp(model, PROMPTS, tokens, LENGTHS, entropy=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = completion_logp(model, PROMPTS, tokens, LENGTHS, entropy=True)
    assert rounded.logp.dtype == torch.float32
    error = (rounded.logp - exact.logp).abs().max().item()
    assert 1e-5 < error < 0.1
    weighted(rounded).backward()
    rounded_gradient = model.get_input_embeddings().weight.grad
    (exact_gradient,) = torch.autograd.grad(weighted(exact), [model.get_input_embeddings().weight])
    assert rounded_gradient.dtype == torch.float32
    relative = (rounded_gradient - exact_gradient).norm() / exact_gradient.norm()
    assert 0 < relative < 0.05


def test_padding_token_embedding_learns() -> None:
    """Here the end token is the padding token: PyTorch would zero its input gradient."""
    model = tiny(tied=False)
    # token 2 (end and padding) is read as an input, in the middle of a completion
    tokens = torch.tensor([[7, 2, 8]])
    completion_logp(model, [[5]], tokens, torch.tensor([3])).logp.sum().backward()
    assert model.get_input_embeddings().weight.grad[2].norm() > 1e-3


def test_gradient_checkpointing_changes_no_gradient() -> None:
    tokens, gradients = some_tokens(), []
    for checkpointing in (False, True):
        model = tiny(dtype=torch.float64)
        if checkpointing:
            checkpoint_activations(model)
        model.train()
        completion_logp(model, PROMPTS, tokens, LENGTHS).logp.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-13)
