"""Adapters in the short training pass and the short decode step: the model's own numbers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gruppo import native
from gruppo.engine import LocalEngine
from gruppo.engine.local.fused import FusedStep
from gruppo.engine.local.probe import can_fuse as can_fuse_step
from gruppo.model import (
    Lora,
    adapter,
    attach,
    can_fuse,
    can_pack,
    completion_logp,
    decoder,
    logprob,
    multiplying,
)
from gruppo.model.adapter import LowRank, find_low_rank, without_adapter
from gruppo.model.casts import Casts
from gruppo.model.decoder import find_decoder
from gruppo.model.decoder_pass import copied_bytes, find_pass
from gruppo.model.gradient import summing
from gruppo.model.logprob import Scored
from gruppo.model.low_rank import LowRanks
from gruppo.types import Request, Sampling
from support.engines import letters, unequal_groups
from support.passes import (
    LENGTHS,
    PROMPTS,
    adapted,
    assert_rounds_like_autocast,
    build,
    gap,
    needs_kernels,
    outcome,
)

peft = pytest.importorskip("peft")


def test_what_adapters_add_by_hand():
    """Two layers of three, with ranks 1 and 2: 3 * [1 2] x, and 0.5 * B A x."""
    rows = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    first = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0]]), 3.0)
    last = LowRank(torch.eye(2), torch.tensor([[0.0, 4.0]]), 0.5)
    ranks = LowRanks([first, None, last], [2, 1, 1], torch.float32)
    assert ranks.forward(rows).tolist() == [[9.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, -2.0]]
    grad = torch.tensor([[1.0, 5.0, 7.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    # 3 * 1 * [1 2] + 0.5 * 1 * 4 * [0 1]; 0.5 * 3 * 4 * [0 1]
    assert ranks.backward(grad).tolist() == [[3.0, 8.0], [0.0, 6.0]]
    (down, up), (other_down, other_up) = ranks.gradients(grad, rows, [(True, True)] * 2)
    assert down.tolist() == [[3.0, 3.0]]  # 3 * x of the first row
    assert up.tolist() == [[9.0], [9.0 * 5]]  # A x is 3 and 0
    assert other_down.tolist() == [[0.0, 0.0], [2.0 + 12.0, 2.0 - 6.0]]
    assert other_up.tolist() == [[0.5 * (1 + 3 * 2), 0.5 * (1 - 3)]]
    assert ranks.gradients(grad, rows, [(False, False)] * 2) == [(None, None)] * 2


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])  # biases; norms of heads
@pytest.mark.parametrize("products", ["torch", "onednn", "native"])
def test_values_and_gradients(name, products):
    model = adapted(name)
    assert can_pack(model)
    assert can_fuse(model)
    with multiplying(products):
        mine, other = outcome(model, fused=True), outcome(model, fused=False)
    assert len(mine) == 1 + 2 * 7 * 2  # log-probabilities; A and B of seven matrices, two layers
    assert gap(mine, other) < 2e-5


@needs_kernels
@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("up_proj",), ("k_proj", "o_proj")])
def test_some_matrices_alone_have_one(targets):
    model = adapted(targets=targets)
    assert len(find_decoder(model).layers[0].adapters) == len(targets)
    assert gap(outcome(model, fused=True), outcome(model, fused=False)) < 2e-5


@needs_kernels
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 1, "down_proj": 5}}], ids=str
)
def test_scales_and_ranks_of_their_own(options):
    settings = {"r": 3, "lora_alpha": 7.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(2)
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(**settings, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    assert gap(outcome(model, fused=True), outcome(model, fused=False)) < 2e-5


@needs_kernels
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
@pytest.mark.parametrize("products", ["torch", "native"])
def test_one_factor_alone_is_trained(frozen, products):
    model = adapted()
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    with multiplying(products):
        mine, other = outcome(model, fused=True), outcome(model, fused=False)
    assert len(mine) == 1 + 7 * 2
    assert gap(mine, other) < 2e-5


@needs_kernels
@pytest.mark.parametrize("products", ["torch", "native"])
def test_gradients_of_two_passes_add_up(products):
    """As a policy sums them over micro-batches, at once in ``grad``."""
    model, tokens = adapted(), torch.randint(0, 60, (7, 6))
    with multiplying(products), summing():
        for _ in range(2):
            scored = completion_logp(model, PROMPTS, tokens, LENGTHS, packed=True, fused=True)
            scored.logp.sum().backward()
    twice = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    completion_logp(model, PROMPTS, tokens, LENGTHS, packed=True).logp.sum().backward()
    once = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gap(twice, {name: 2 * grad for name, grad in once.items()}) < 2e-5


@needs_kernels
def test_frozen_matrices_of_the_products_type_are_not_copied():
    model, casts = adapted(half=True), Casts()
    tokens = torch.randint(0, 60, (7, 6))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            completion_logp(
                model, PROMPTS, tokens, LENGTHS, packed=True, fused=True, casts=casts
            ).logp.sum().backward()
    assert not casts._made
    assert copied_bytes(find_pass(model), dtype=torch.bfloat16, products="torch") == 0


@needs_kernels
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, -1.0])
def test_a_new_adapter_is_tried_with_numbers(monkeypatch, half, factor):
    """B is 0 at first, which would hide a wrong scale; afterwards it is 0 again."""
    dtype = torch.bfloat16 if half else torch.float32
    model = attach(build("llama"), Lora(rank=3), compute_dtype=dtype)
    assert can_fuse(model)
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    real = adapter.find_low_rank

    def wrong(module: nn.Module) -> object:
        found = real(module)
        if found is None or found[1] is None:
            return found
        return found[0], replace(found[1], scale=found[1].scale * factor)

    monkeypatch.setattr(decoder, "find_low_rank", wrong)
    assert not can_fuse(model)
    assert not can_fuse_step(model, dtype)


@needs_kernels
@pytest.mark.parametrize("products", ["torch", "native"])
def test_bfloat16_is_as_far_from_float32_as_autocast_is(products):
    exact = outcome(adapted(), fused=False)
    assert_rounds_like_autocast(adapted(half=True), exact, products)


@needs_kernels
def test_switched_off_it_is_the_base_model():
    model, tokens = adapted(), torch.randint(0, 60, (7, 6))

    def logp(one: nn.Module) -> torch.Tensor:
        return completion_logp(one, PROMPTS, tokens, LENGTHS, packed=True, fused=True).logp

    with torch.no_grad():
        on = logp(model)
        with without_adapter(model):
            assert not find_pass(model).layers[0].adapters
            off = logp(model)
        assert torch.equal(off, logp(build("llama")))
        assert torch.equal(on, logp(model))
    assert (on - off).abs().max() > 0.1


@needs_kernels
@pytest.mark.filterwarnings("ignore")  # of peft, about transformers and what cannot be merged
def test_adapters_that_compute_more_go_the_plain_way():
    dropping = adapted(dropout=0.1)
    assert find_pass(dropping.train()) is None
    assert find_pass(dropping.eval()) is not None
    for other in ({"use_dora": True}, {"lora_bias": True}, {"target_modules": ["lm_head"]}):
        settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **other}
        assert find_pass(peft.get_peft_model(build("llama"), peft.LoraConfig(**settings))) is None
    twice = adapted()
    twice.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    twice.base_model.set_adapter(["default", "second"])
    assert find_pass(twice) is None
    twice.base_model.set_adapter(["default"])
    assert find_pass(twice) is not None


@needs_kernels
def test_one_that_is_merged_is_in_the_matrices():
    model = adapted()
    before = outcome(model, fused=True)["logp"]
    model.merge_adapter()
    assert not find_pass(model).layers[0].adapters
    torch.manual_seed(1)  # as outcome does
    tokens = torch.randint(0, 60, (7, 6))
    merged = completion_logp(model, PROMPTS, tokens, LENGTHS, packed=True, fused=True).logp
    assert (merged - before).abs().max() < 1e-4
    with without_adapter(model):
        assert find_pass(model) is None  # peft takes it out at the next forward


def test_what_is_no_adapter_is_none():
    assert find_low_rank(nn.Linear(2, 2)) is None


@needs_kernels
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("products", ["torch", "native"])
def test_a_decode_step_has_the_adapter(half, products, monkeypatch):
    """Its log-probabilities are those of transformers' own forward, adapter and all."""
    if half and products == "native" and not native.can_multiply(torch.bfloat16):
        pytest.skip("no native bfloat16 products here")
    model = adapted(half=half)
    dtype = torch.bfloat16 if half else torch.float32
    assert can_fuse_step(model, dtype)
    engine = LocalEngine(model, letters, pad_token=0, compute_dtype=dtype, products=products)
    assert engine.is_shared
    requests = [Request(tokens=(5, 6, 7), num_samples=3, key=(0, 0))]
    steps: list[int] = []
    real = FusedStep.__call__

    def counted(self: FusedStep, *arguments: object) -> torch.Tensor:
        steps.append(1)
        return real(self, *arguments)

    monkeypatch.setattr(FusedStep, "__call__", counted)
    (drawn,) = engine.generate(requests, Sampling(max_tokens=40))  # enough for own panels
    assert len(steps) == 39
    tokens = torch.tensor([[*c.tokens, *[0] * (40 - len(c.tokens))] for c in drawn])
    length = torch.tensor([len(c.tokens) for c in drawn])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        plain = completion_logp(model, [(5, 6, 7)] * 3, tokens, length).logp
        with without_adapter(model):
            base = completion_logp(model, [(5, 6, 7)] * 3, tokens, length).logp
    mine = torch.tensor([[*c.logp, *[0.0] * (40 - len(c.logp))] for c in drawn])
    assert length.tolist() == [40] * 3
    assert (mine - plain).abs().max() < (0.15 if half else 2e-5)
    assert (mine - base).abs().mean() > 0.1


@needs_kernels
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rank", [3, 4])
def test_an_adapters_layers_in_one_call_are_the_same_bits(half, rank, monkeypatch):
    """As a call for each operation, with an odd number of ranks too."""
    if half and not native.can_multiply(torch.bfloat16):
        pytest.skip("no native bfloat16 products here")
    model = adapted(half=half, rank=rank, targets=("q_proj", "o_proj", "up_proj", "down_proj"))
    dtype = torch.bfloat16 if half else torch.float32
    calls: list[int] = []
    step = native.DecodeLayers.step
    monkeypatch.setattr(
        native.DecodeLayers, "step", lambda *given, **more: calls.append(1) or step(*given, **more)
    )
    found = []
    for together in (True, False):
        if not together:
            monkeypatch.setattr(native, "can_decode", lambda layers, dtype: False)
        engine = LocalEngine(
            model, letters, pad_token=0, products="native", max_rows=3, compute_dtype=dtype
        )
        found.append(engine.generate(unequal_groups(), Sampling(max_tokens=40)))
        assert bool(calls) == together
        calls.clear()
    assert found[0] == found[1]


@pytest.mark.parametrize(("off", "everywhere", "packs"), [(0.8, False, True), (0.21, True, False)])
def test_one_unlikely_token_does_not_keep_an_adapter_from_being_packed(
    monkeypatch, off, everywhere, packs
):
    """Of -20, rounding in bfloat16 may take more than the bound, which is one for the mean."""

    def scored(model, prompts, tokens, length, *, packed, fused):
        logp = torch.full(tokens.shape, -5.0)
        if packed:
            logp[:, : None if everywhere else 1][: None if everywhere else 1] += off
        valid = torch.arange(tokens.shape[1]) < length[:, None]
        return Scored(logp=logp * valid, entropy=None)

    monkeypatch.setattr(logprob, "completion_logp", scored)
    assert can_pack(adapted(half=True)) is packs
