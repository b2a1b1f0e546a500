"""What every engine must do, whatever it is made of."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from gruppo.types import Sampling
from support.engines import END, assert_same, letters, logits_of, requests, sharpen


def processed(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities after temperature and filters, the slow and obvious way."""
    logp = (logits / sampling.temperature).log_softmax(-1)
    for row in logp:
        order = row.argsort(descending=True).tolist()
        kept = order[: sampling.top_k or None]
        probs = row[kept].softmax(-1).tolist()
        count = next(n for n in range(1, len(kept) + 1) if sum(probs[:n]) >= sampling.top_p - 1e-9)
        kept = [k for k in kept[:count] if row[k].exp() >= sampling.min_p * row[order[0]].exp()]
        row[[k for k in order if k not in kept]] = -math.inf
        row -= row.logsumexp(-1)
    return logp


SAMPLINGS = [
    Sampling(max_tokens=12),
    Sampling(max_tokens=12, temperature=0.7),
    Sampling(max_tokens=12, top_k=5),
    Sampling(max_tokens=12, temperature=1.3, top_p=0.8),
    Sampling(max_tokens=12, min_p=0.2),
    Sampling(max_tokens=12, temperature=0.7, top_k=20, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
def test_logp_is_that_of_a_plain_forward(make, model, sampling):
    asked = requests(3, 9, 5, num_samples=3)
    groups = make(model, letters, max_rows=4).generate(asked, sampling)
    assert [len(group) for group in groups] == [3, 3, 3]
    for request, group in zip(asked, groups, strict=True):
        for completion in group:
            assert len(completion.tokens) == 12
            logp = processed(logits_of(model, request.tokens, completion.tokens), sampling)
            exact = logp.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
            assert completion.logp == pytest.approx(exact.tolist(), abs=1e-5)


def test_greedy_equals_transformers_generate(make, model):
    asked = requests(3, 11, 6, 8)
    width = 11
    ids = torch.tensor([[END] * (width - len(r.tokens)) + list(r.tokens) for r in asked])
    mask = torch.tensor([[0] * (width - len(r.tokens)) + [1] * len(r.tokens) for r in asked])
    config = GenerationConfig(
        do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=END
    )
    expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    drawn = make(model, letters).generate(asked, Sampling(max_tokens=20, temperature=0.0))
    assert [list(group[0].tokens) for group in drawn] == expected[:, width:].tolist()
    assert len({group[0].tokens for group in drawn}) == 4
    assert all(group[0].logp == (0.0,) * 20 for group in drawn)


def test_what_is_drawn_does_not_depend_on_the_batch(make, model):
    sampling = Sampling(max_tokens=12, stop_tokens=(3, 40, 41, 42, 43, 44, 45, 46))
    asked = requests(4, 9, 2, num_samples=4)
    expected = make(model, letters).generate(asked, sampling)
    for max_rows in (1, 3, 6):
        for group, same in zip(
            make(model, letters, max_rows=max_rows).generate(asked, sampling), expected, strict=True
        ):
            for left, right in zip(group, same, strict=True):
                assert_same(left, right)
    backwards = make(model, letters, max_rows=9).generate(asked[::-1], sampling)[::-1]
    for index, request in enumerate(asked):
        alone = make(model, letters).generate([request], sampling)[0]
        for left, other, right in zip(alone, backwards[index], expected[index], strict=True):
            assert_same(left, right)
            assert_same(other, right)


def test_samples_steps_and_draws_differ_but_keys_repeat(make, model):
    engine = make(model, letters)
    sampling = Sampling(max_tokens=16)
    base = requests(5, num_samples=8)[0]
    again, step, draw = (
        dataclasses.replace(base, key=key) for key in ((7, 0, 0), (7, 1, 0), (7, 0, 1))
    )
    groups = engine.generate([base, again, step, draw], sampling)
    assert groups[0] == groups[1]
    assert len({c.tokens for group in groups for c in group}) == 24
    fewer = engine.generate([dataclasses.replace(base, num_samples=3)], sampling)[0]
    for left, right in zip(fewer, groups[0][:3], strict=True):
        assert_same(left, right)


def test_continuation_draws_what_was_left(make, model):
    engine = make(model, letters)
    request = requests(5)[0]
    whole = engine.generate([request], Sampling(max_tokens=12))[0][0]
    tail = dataclasses.replace(request, tokens=request.tokens + whole.tokens[:5], offset=5)
    rest = engine.generate([tail], Sampling(max_tokens=7))[0][0]
    assert rest.tokens == whole.tokens[5:]


def test_first_token_follows_the_softmax(make, model):
    """Chi-square over the tokens expected at least five times among 2,000."""
    request = requests(4, num_samples=2000)[0]
    group = make(model, letters, max_rows=2000).generate([request], Sampling(max_tokens=1))[0]
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in group]), minlength=258)
    expected = 2000 * logits_of(model, request.tokens, (0,))[0].softmax(-1)
    often = expected >= 5
    left = torch.cat([counts[often].double(), counts[~often].sum()[None].double()])
    right = torch.cat([expected[often], expected[~often].sum()[None]])
    assert len(left) > 10
    freedom = len(left) - 1
    chi2 = float(((left - right) ** 2 / right).sum())
    assert chi2 < freedom + 3.1 * math.sqrt(2 * freedom) + 4  # about the 99.9 % quantile


def test_nothing_asked(make, model):
    assert make(model, letters).generate([], Sampling(max_tokens=4)) == []


REFUSED = [
    ({"tokens": ()}, {}, r"request 1 \(key \(7, 0, 1\)\) has an empty prompt"),
    ({"tokens": (1,) * 513}, {}, "request 1 .* prompt of 513 tokens, .* at most 512"),
    ({"tokens": (1, 258)}, {}, "request 1 .* token id 258, .* ids 0 to 257"),
    ({"tokens": (1, -1)}, {}, "request 1 .* token id -1"),
    ({"num_samples": 0}, {}, "request 1 .* num_samples = 0; use 1 or more"),
    ({"offset": -1}, {}, "request 1 .* offset = -1"),
    ({}, {"max_tokens": -1}, "sampling.max_tokens = -1; use 0 or more"),
    ({}, {"temperature": -0.5}, "sampling.temperature = -0.5; use 0"),
    ({}, {"temperature": math.nan}, "sampling.temperature = nan"),
    ({}, {"top_p": 0.0}, "sampling.top_p = 0.0"),
    ({}, {"top_p": 1.5}, "sampling.top_p = 1.5"),
    ({}, {"top_k": -1}, "sampling.top_k = -1; use 0 for off"),
    ({}, {"min_p": 2.0}, "sampling.min_p = 2.0"),
    ({}, {"stop": ("a", "")}, "sampling.stop holds an empty string"),
]


@pytest.mark.parametrize(("request_fields", "fields", "message"), REFUSED)
def test_senseless_requests_are_refused(make, model, request_fields, fields, message):
    first, second = requests(4, 5)
    asked = [first, dataclasses.replace(second, **request_fields)]
    with pytest.raises(ValueError, match=message):
        make(model, letters).generate(asked, Sampling(**{"max_tokens": 4, **fields}))


def test_load_changes_version_and_output(make, model):
    engine = make(model, letters)
    asked, sampling = requests(5, num_samples=2), Sampling(max_tokens=8)
    before = engine.generate(asked, sampling)[0]
    assert before[0].version == (0,) * 8
    engine.load(None, 3)
    shared = engine.generate(asked, sampling)[0]
    assert shared[0].tokens == before[0].tokens
    assert shared[0].version == (3,) * 8
    torch.manual_seed(1)
    weights = {name: torch.randn_like(w) * w.std() for name, w in model.state_dict().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied
    engine.load(weights, 4)
    loaded = engine.generate(asked, sampling)[0]
    assert loaded[0].version == (4,) * 8
    assert loaded[0].tokens != before[0].tokens
    fresh = sharpen(type(model)(model.config))
    fresh.load_state_dict(weights)
    logp = logits_of(fresh, asked[0].tokens, loaded[0].tokens).log_softmax(-1)
    exact = logp.gather(-1, torch.tensor(loaded[0].tokens)[:, None])[:, 0]
    assert loaded[0].logp == pytest.approx(exact.tolist(), abs=1e-5)


def test_load_refuses_weights_of_another_model(make, model):
    engine = make(model, letters)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    norm = {"model.norm.weight": torch.zeros(32)}
    for weights, message in (
        ({**before, "extra": torch.zeros(1)}, "weights hold 'extra'"),
        ({**before, "model.norm.weight": torch.zeros(7)}, r"'model.norm.weight' has shape \(7,\)"),
        (norm, "weights lack"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.load(weights, 9)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert engine.generate(requests(3), Sampling(max_tokens=1))[0][0].version == (0,)


def test_close_twice(make, model):
    engine = make(model, letters)
    engine.generate(requests(3), Sampling(max_tokens=1))
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.generate(requests(3), Sampling(max_tokens=1))


def test_generate_leaves_the_model_as_it_was(make, model):
    model.train()
    model.model.layers[0].eval()
    frozen = model.model.layers[1].mlp.up_proj.weight
    frozen.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    make(model, letters).generate(requests(4, 6, num_samples=3), Sampling(max_tokens=5))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    for parameter in model.parameters():
        assert parameter.requires_grad == (parameter is not frozen)
        assert (parameter.grad is None) == (parameter is frozen)
    assert all(bool((p.grad == 0.5).all()) for p in model.parameters() if p.requires_grad)


def test_a_request_may_ask_for_fewer_tokens(make, model):
    engine = make(model, letters, max_rows=2)
    sampling = Sampling(max_tokens=12)
    asked = requests(5, 3, 7)
    whole = engine.generate(asked, sampling)
    bounds = (4, None, 40)
    short = [
        dataclasses.replace(request, max_tokens=most)
        for request, most in zip(asked, bounds, strict=True)
    ]
    drawn = engine.generate(short, sampling)
    for rows, others, size in zip(drawn, whole, (4, 12, 12), strict=True):
        assert rows[0].tokens == others[0].tokens[:size]
        assert rows[0].finish == "length"
    with pytest.raises(ValueError, match=r"max_tokens = -1; use 0 or more"):
        engine.generate([dataclasses.replace(asked[0], max_tokens=-1)], sampling)
