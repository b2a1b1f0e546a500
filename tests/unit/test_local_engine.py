"""What is particular to the local engine: its waves, its cache, mixed precision, other models."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.auto import CONFIG_MAPPING

from gruppo.engine.local import LocalEngine
from gruppo.engine.local.batch import Prompts, Row, Wave, plan_waves
from gruppo.engine.local.cache import GrowingLayer, make_cache, select_rows
from gruppo.model import Lora, attach, merged_weights
from gruppo.model.parts import context_length
from gruppo.types import Request, Sampling
from support.engines import TINY, assert_same


def asked(*shapes: tuple[int, int]) -> list[Request]:
    return [
        Request(tokens=tuple(range(1, length + 1)), num_samples=samples, key=(0, 0, index))
        for index, (length, samples) in enumerate(shapes)
    ]


def shape(waves: list[list[Row]]) -> list[dict[int, int]]:
    """Rows of each request in each wave."""
    return [
        {index: sum(row.request == index for row in wave) for index in {r.request for r in wave}}
        for wave in waves
    ]


def test_groups_stay_together_if_they_fit():
    requests = asked((5, 4), (9, 4), (7, 4))
    assert shape(plan_waves(requests, [8] * 3, max_rows=10)) == [{1: 4, 2: 4}, {0: 4}]
    assert shape(plan_waves(requests, [8] * 3, max_rows=12)) == [{0: 4, 1: 4, 2: 4}]
    assert shape(plan_waves(requests, [8] * 3, max_rows=4)) == [{1: 4}, {2: 4}, {0: 4}]


def test_groups_too_large_are_split():
    waves = plan_waves(asked((5, 7), (4, 2)), [8, 8], max_rows=3)
    assert shape(waves) == [{0: 3}, {0: 3}, {0: 1, 1: 2}]
    assert sorted(row.sample for wave in waves for row in wave if row.request == 0) == [*range(7)]


def test_rows_without_room_are_not_planned():
    assert plan_waves(asked((5, 2), (4, 2)), [0, 0], max_rows=3) == []
    assert shape(plan_waves(asked((5, 2), (4, 2)), [0, 1], max_rows=3)) == [{1: 2}]


def test_prompt_tokens_of_a_wave_are_bounded():
    """16,384 padded tokens: 16 prompts of 1,000."""
    waves = plan_waves(asked(*[(1000, 1)] * 40), [8] * 40, max_rows=128)
    assert [len(wave) for wave in waves] == [16, 16, 8]


def test_equal_prompts_are_read_once():
    requests = [*asked((3, 2), (2, 1)), *asked((3, 1))]
    rows = [Row(request=r, sample=s, limit=4) for r, s in ((0, 0), (0, 1), (1, 0), (2, 0))]
    prompts = Prompts.of(rows, requests, pad_token=9, device=torch.device("cpu"))
    assert prompts.tokens.tolist() == [[1, 2, 3], [9, 1, 2]]
    assert prompts.mask.tolist() == [[True, True, True], [False, True, True]]
    assert prompts.positions.tolist() == [[0, 1, 2], [0, 0, 1]]
    assert prompts.source.tolist() == [0, 0, 1, 0]


def test_holes_are_filled_from_the_end():
    requests = asked((2, 6))
    rows = [Row(request=0, sample=s, limit=3) for s in range(6)]
    prompts = Prompts.of(rows, requests, pad_token=9, device=torch.device("cpu"))
    wave = Wave(rows, requests, prompts)
    wave.write(torch.arange(10, 16), torch.arange(6.0))
    assert wave.retire(torch.zeros(6, dtype=torch.bool)) is None
    wave.write(torch.arange(20, 26), torch.arange(6.0))
    keep = wave.retire(torch.tensor([False, True, False, True, False, False]))
    assert keep.tolist() == [0, 4, 2, 5]
    assert wave.rows.tolist() == [0, 4, 2, 5]
    assert wave.running() == [[10, 20], [14, 24], [12, 22], [15, 25]]
    assert wave.positions().tolist() == [[3]] * 4
    wave.write(torch.arange(30, 34), torch.arange(4.0))
    assert wave.retire(torch.tensor([True, False, False, False])).tolist() == []
    assert [(tokens, stopped) for tokens, _, stopped in wave.results()] == [
        ([10, 20, 30], True),
        ([11, 21], True),
        ([12, 22, 32], False),
        ([13, 23], True),
        ([14, 24, 31], False),
        ([15, 25, 33], False),
    ]


def test_cache_layer_equals_transformers_own():
    """The same sequence of appends, an expansion, a removal and many more appends."""
    torch.manual_seed(0)
    ours, theirs = GrowingLayer(None), DynamicCache().layer_class_to_replicate()
    rows = 3

    def append(columns: int) -> None:
        states = torch.randn(2, rows, 2, columns, 4)
        got, expected = ours.update(*states), theirs.update(*states)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)

    append(5)
    for index in ([0, 0, 1, 1, 2, 2], [0, 5, 2, 3], [2, 1, 0], [0, 2]):
        for layer in (ours, theirs):
            layer.reorder_cache(torch.tensor(index))
        rows = len(index)
        for _ in range(150):
            append(1)


def test_cache_keeps_the_compute_type():
    layer = GrowingLayer(torch.bfloat16)
    keys, values = layer.update(torch.full((1, 1, 2, 4), 1.001), torch.ones(1, 1, 2, 4))
    assert (keys.dtype, values.dtype) == (torch.bfloat16, torch.bfloat16)
    assert keys.unique().tolist() == [1.0]


ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "qwen2_moe": {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def build(name: str) -> nn.Module:
    config = CONFIG_MAPPING[name](**{**TINY, **ARCHITECTURES[name]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logp_equals_a_plain_forward_on_other_models(name):
    """Prompts of different lengths, rows that leave, beyond the sliding window."""
    model = build(name)
    engine = LocalEngine(model, str, pad_token=0, max_rows=6)
    requests = asked((4, 3), (9, 3), (2, 2))
    sampling = Sampling(max_tokens=14, stop_tokens=tuple(range(5, 17)))
    lengths = set()
    for request, group in zip(requests, engine.generate(requests, sampling), strict=True):
        for completion in group:
            ids = torch.tensor([request.tokens + completion.tokens])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
            logp = logits[0, len(request.tokens) - 1 : -1].double().log_softmax(-1)
            exact = logp.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
            assert completion.logp == pytest.approx(exact.tolist(), abs=5e-5)
            lengths.add(len(completion.tokens))
    assert len(lengths) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_model_draws_as_its_merged_weights_do(dtype):
    """A fresh adapter changes nothing; a trained one draws what the plain merged model draws."""
    plain, model = build("llama"), attach(build("llama"), Lora(rank=4))
    requests, sampling = asked((4, 3), (9, 3)), Sampling(max_tokens=10, stop_tokens=(5, 6))
    engine = LocalEngine(model, str, pad_token=0, compute_dtype=dtype)
    before = engine.generate(requests, sampling)
    same = LocalEngine(plain, str, pad_token=0, compute_dtype=dtype).generate(requests, sampling)
    for left, right in zip(before, same, strict=True):
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    after = engine.generate(requests, sampling)
    assert after != before
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    plain.load_state_dict(merged_weights(model))
    for request, group in zip(requests, after, strict=True):
        for completion in group:
            ids = torch.tensor([request.tokens + completion.tokens])
            with torch.no_grad():
                logits = plain(input_ids=ids, use_cache=False).logits
            logp = logits[0, len(request.tokens) - 1 : -1].double().log_softmax(-1)
            exact = logp.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
            close = 5e-5 if dtype == torch.float32 else 0.5
            assert completion.logp == pytest.approx(exact.tolist(), abs=close)


def test_the_context_is_known_whatever_the_configuration_calls_it():
    lengths = {name: context_length(build(name)) for name in ("llama", "gpt2")}
    assert lengths == {"llama": 64, "gpt2": 64}
    assert context_length(attach(build("llama"), Lora(rank=1))) == 64
    engine = LocalEngine(build("gpt2"), str, pad_token=0)
    ((completion,),) = engine.generate(asked((60, 1)), Sampling(max_tokens=9))
    assert (len(completion.tokens), completion.finish) == (4, "length")


def test_only_plain_layers_are_replaced():
    config = build("gemma3_text").config
    config.layer_types = ["sliding_attention", "full_attention"]
    kinds = [type(layer) for layer in make_cache(config, None).layers]
    assert kinds == [DynamicSlidingWindowLayer, GrowingLayer]


def test_selecting_rows_of_a_whole_cache():
    cache = make_cache(build("llama").config, None)
    states = torch.arange(3.0)[:, None, None, None].expand(3, 2, 4, 8)
    for layer in range(2):
        cache.update(states, -states, layer)
    select_rows(cache, torch.tensor([2, 2, 0, 1]))
    for layer in cache.layers:
        assert layer.keys[:, 0, 0, 0].tolist() == [2.0, 2.0, 0.0, 1.0]
        assert layer.values[:, 1, 3, 7].tolist() == [-2.0, -2.0, 0.0, -1.0]


def test_mixed_precision_rounds_and_nothing_else():
    model = build("llama")
    requests = asked((4, 4), (9, 4))
    sampling = Sampling(max_tokens=1)
    single = LocalEngine(model, str, pad_token=0).generate(requests, sampling)
    mixed = LocalEngine(model, str, pad_token=0, compute_dtype=torch.bfloat16)
    half = mixed.generate(requests, sampling)
    pairs = [
        (a.logp[0], b.logp[0])
        for left, right in zip(single, half, strict=True)
        for a, b in zip(left, right, strict=True)
        if a.tokens == b.tokens
    ]
    assert len(pairs) >= 5
    gaps = [abs(a - b) for a, b in pairs]
    assert 0 < max(gaps) < 0.3
    assert next(model.parameters()).dtype == torch.float32


def test_mixed_precision_casts_each_weight_once(monkeypatch: pytest.MonkeyPatch):
    """Frozen weights too: after the first token, no product casts a matrix again."""
    model = build("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    engine = LocalEngine(model, str, pad_token=0, compute_dtype=torch.bfloat16)
    request = asked((4, 2))

    def casts(tokens: int) -> int:
        with torch.profiler.profile(record_shapes=True) as profile:
            engine.generate(request, Sampling(max_tokens=tokens))
        matrix = [48, 32]  # gate and up projection
        return sum(
            event.name == "aten::_to_copy" and event.input_shapes[:1] == [matrix]
            for event in profile.events()
        )

    assert casts(2) == casts(9) == 4
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_training_keeps_its_gradients_inside_a_callers_autocast():
    model = build("llama").train()
    engine = LocalEngine(model, str, pad_token=0, compute_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        engine.generate(asked((4, 2)), Sampling(max_tokens=3))
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.float().logsumexp(-1).sum().backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad
    assert float(gradient.abs().sum()) > 0


def test_updated_weights_are_seen_inside_a_callers_autocast():
    model = build("llama")
    engine = LocalEngine(model, str, pad_token=0, compute_dtype=torch.bfloat16)
    sampling = Sampling(max_tokens=6)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.tensor([[1, 2, 3]]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1)
        inside = engine.generate(asked((4, 4)), sampling)
    assert inside == engine.generate(asked((4, 4)), sampling)


def test_settings_are_checked():
    model = build("llama")
    with pytest.raises(ValueError, match="max_rows = 0; use 1 or more"):
        LocalEngine(model, str, pad_token=0, max_rows=0)
    with pytest.raises(ValueError, match=r"compute_dtype = torch\.int8"):
        LocalEngine(model, str, pad_token=0, compute_dtype=torch.int8)


def test_broken_weights_are_named():
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="weights are broken"):
        LocalEngine(model, str, pad_token=0).generate(asked((4, 2)), Sampling(max_tokens=3))
