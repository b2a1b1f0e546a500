"""The memory plan: counted parts equal what a real pass and the real engine hold."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig

from gruppo import native, plan
from gruppo.engine import LocalEngine
from gruppo.model import Casts, Lora, attach, fused, load
from gruppo.model.decoder_pass import decoder_states, find_pass
from gruppo.model.footprint import Shape, footprint
from gruppo.model.logprob import packed_states, padded_states
from gruppo.recipe import load as load_recipe
from gruppo.types import Request, Sampling


def really_saved(model, shape: Shape, dtype, *, packed: bool = True) -> int:
    """Bytes that autograd keeps of a real forward of the same rows, without thrift."""
    given = (shape.packed(),) if packed else shape.padded()
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    model.train()
    mixed = dtype == torch.bfloat16
    with saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", dtype, enabled=mixed):
        (packed_states if packed else padded_states)(model, *given)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_saved_activations_are_those_of_a_real_forward(tiny_folder, dtype, lora):
    shape = Shape.even(prompts=[9, 4], group=3, completion=6)
    found = footprint(str(tiny_folder), shape, compute=dtype, lora=lora, thrift=False)
    model = load(str(tiny_folder)).model
    if lora is not None:
        model = attach(model, lora, compute_dtype=dtype)
    assert found.saved == really_saved(model, shape, dtype)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.trainable == sum(p.nbytes for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_packed_are_padded_with_their_prompts(tiny_folder, dtype):
    """Of 9 + 5 and 4 + 2 tokens, the last not read: both of 13."""
    shape = Shape(prompts=[9, 4], completions=[[5], [2]])
    ids, source = shape.padded()
    assert (ids.shape, source.tolist()) == ((2, 13), [8, 9, 10, 11, 12, 16, 17])
    found = footprint(str(tiny_folder), shape, compute=dtype, packed=False, thrift=False)
    model = load(str(tiny_folder)).model
    assert found.saved == really_saved(model, shape, dtype, packed=False)
    with_thrift = footprint(str(tiny_folder), shape, compute=dtype, packed=False)
    assert with_thrift.saved < found.saved
    assert with_thrift.copies == 0


@pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_in_few_calls_keeps_what_is_counted(tiny_folder, dtype):
    shape = Shape.even(prompts=[9, 4], group=3, completion=6)
    found = footprint(str(tiny_folder), shape, compute=dtype)
    model = load(str(tiny_folder)).model
    decoder = find_pass(model)
    assert decoder is not None
    kept: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    mixed = dtype == torch.bfloat16
    casts = Casts()
    with saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", dtype, enabled=mixed):
        decoder_states(decoder, shape.packed(), casts)
    assert found.saved == pytest.approx(sum(kept.values()), rel=0.01)
    # the joint matrices of two layers, 32 wide, and in bfloat16 all others and the head
    copied = sum(matrix.nbytes for _, _, matrix in casts._made.values())
    head = 258 * 32 * 2 if mixed else 0
    assert found.copies == copied + head
    alone = footprint(str(tiny_folder), shape, compute=dtype, products="native")
    assert alone.copies == 2 * 258 * 32 * dtype.itemsize  # the head's panels, both ways
    assert alone.saved == found.saved


def test_checkpointing_keeps_less(tiny_folder):
    sizes = [
        footprint(
            str(tiny_folder),
            Shape.even(prompts=[9], group=3, completion=6),
            gradient_checkpointing=on,
            thrift=False,
        ).saved
        for on in (False, True)
    ]
    assert sizes[1] < sizes[0] / 2


@pytest.fixture(autouse=True)
def _this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds may grow from one plan to the next."""
    monkeypatch.setattr(plan, "resident_bytes", lambda: 2**30)


def recipe(tiny_folder, *changes: str):
    settings = {
        "model.name": str(tiny_folder),
        "model.compute": "float32",
        "model.products": "torch",
        "rollout.prompts_per_step": "3",
        "rollout.group_size": "4",
        "rollout.max_tokens": "20",
        "train.tokens_per_microbatch": "200",
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    return load_recipe("quickstart", [*given, *changes])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_rows": 5},  # the third group begins beside the end of the second
        {"max_cached_tokens": 60},
        {"max_cached_tokens": 7},  # a row alone
        {"kind": "plain"},
        {"kind": "plain", "max_rows": 3, "max_cached_tokens": 7},  # bounds shared ones alone
    ],
    ids=["shared", "few rows", "few tokens", "one row", "plain", "plain, few rows"],
)
@pytest.mark.parametrize(("tokens", "group"), [(20, 4), (131, 1)])
def test_cache_is_what_the_engine_holds(tiny_folder, settings, tokens, group):
    changes = [f"engine.{name}={value}" for name, value in settings.items()]
    changes += [f"rollout.max_tokens={tokens}", "objective.credit={kind = 'reinforce_pp'}"]
    asked = recipe(tiny_folder, *changes, f"rollout.group_size={group}")
    found = plan.memory(asked, prompt_tokens=10)
    model = load(str(tiny_folder)).model
    engine = LocalEngine(model, lambda tokens: "", pad_token=256, **settings)
    requests = [Request(tokens=(i, *range(9)), num_samples=group, key=(0, i)) for i in range(3)]
    engine.generate(requests, Sampling(max_tokens=tokens))
    assert engine.is_shared == (settings.get("kind") != "plain")
    assert found.cache == engine.peak_cache_bytes > 0


def test_plain_rows_are_drawn_from_the_weights_as_they_are(tiny_folder):
    """No packed matrices but autocast's; logits of the rows that run together."""
    plain, few, half = (
        plan.memory(recipe(tiny_folder, *changes), prompt_tokens=10)
        for changes in (
            ["engine.kind=plain", "engine.max_rows=3"],
            ["engine.max_cached_tokens=60"],
            ["engine.kind=plain", "model.compute=bfloat16"],
        )
    )
    copies = plan._copies("cpu")
    assert (plain.packed, plain.drawing) == (0, 3 * 258 * 4 * copies)
    assert few.drawing == 3 * 258 * 4 * copies
    assert half.packed == few.packed // 2 > 0


def test_kept_activations_are_counted_and_spared(tiny_folder):
    """Tiny: 2 layers of 32 with 4 and 2 heads of 8 and 64 between, in float32.

    A token's results are 64 + 32 + 128 + 32 numbers a layer, of which a pass would keep all but the
    last 32. Three groups of 4 completions of 20 tokens, of which 19 are read; 2 groups go together.
    """
    needs = 3 * 4 * 20 * 2 * (64 + 32 + 128 + 32) * 4
    spared = 2 * 4 * 19 * 2 * (64 + 32 + 128) * 4

    def planned(gib: float, *changes: str) -> tuple[int, int]:
        found = plan.memory(
            recipe(tiny_folder, "model.products=native", f"engine.max_kept_gib={gib!r}", *changes),
            prompt_tokens=10,
        )
        return found.results, found.activations

    none, without = planned(0.0)
    assert none == 0
    assert planned(1.0) == (needs, without - spared)
    assert planned(needs / 2**30) == (needs, without - spared)
    assert planned((needs - 4096) / 2**30) == (needs - 4096, without)
    assert planned(1.0, "rollout.oversample=1.5") == (5 * needs // 3, without)
    live = ("rollout.filter=resample", "rollout.max_gen_batches=4")
    assert planned(1.0, *live) == (4 * needs, without - spared)
    greedy = ("objective.credit={kind = 'remax'}",)
    assert planned(1.0, *greedy)[0] == 5 * needs // 4
    assert planned(1.0, "model.products=torch")[0] == 0
    plain, kept = (
        plan.memory(recipe(tiny_folder, "model.products=native", gib), prompt_tokens=10)
        for gib in ("engine.max_kept_gib=0.0", "engine.max_kept_gib=1.0")
    )
    assert kept.sampling - plain.sampling == kept.updating - plain.updating == needs


def test_what_a_captured_step_reads_stays_while_training(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (plan._kept("cpu", 100), plan._kept("cuda", 100)) == (0, 100)
    card = SimpleNamespace(total_memory=400)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert (plan._kept("cuda:0", 100), plan._kept("cuda:0", 101)) == (100, 0)


@pytest.mark.parametrize(("now", "counted"), [(2**28, 13 * 2**30 // 20), (2**30, 2**30)])
def test_what_opening_a_model_will_load_is_counted(tiny_folder, monkeypatch, now, counted):
    """A plan is made before that; one that is made later counts what is there."""
    monkeypatch.setattr(plan, "resident_bytes", lambda: now)
    assert plan.memory(recipe(tiny_folder), prompt_tokens=10).process == counted


def test_the_largest_micro_batch_fits_the_budget(tiny_folder):
    """Prompts of 10, completions of 20: 90 a group of four; two groups are 180, a row more 210."""

    def groups(*changes):
        full = plan._full(recipe(tiny_folder, *changes), 10).shape
        assert {*full.prompts} == {10}
        assert {length for group in full.completions for length in group} == {20}
        return [len(group) for group in full.completions]

    assert groups() == [4, 4]
    assert groups("train.tokens_per_microbatch=120") == [4, 1]
    assert groups("train.tokens_per_microbatch=1") == [1]
    assert groups("train.tokens_per_microbatch=9999") == [4, 4, 4]
    assert groups("train.tokens_per_microbatch=9999", "train.minibatches=2") == [4, 4]


def test_the_largest_micro_batch_of_rows_that_are_not_packed(tiny_folder):
    """Prompts of 10, completions of 20: 30 a row, whatever its group."""

    def rows(budget: int, *changes: str):
        changes = (f"train.tokens_per_microbatch={budget}", "model.packing=false", *changes)
        full = plan._full(recipe(tiny_folder, *changes), 10)
        count = len(full.shape.prompts)
        assert full.shape == Shape(prompts=[10] * count, completions=[[20]] * count)
        return count, full.alone

    assert rows(200) == (6, False)
    assert rows(29) == (1, False)
    assert rows(360) == (12, True)
    assert rows(9999, "train.minibatches=2") == (8, True)
    found = plan.memory(recipe(tiny_folder, "model.packing=false"), prompt_tokens=10)
    shape = Shape(prompts=[10] * 6, completions=[[20]] * 6)
    assert found.activations == footprint(str(tiny_folder), shape, packed=False).saved
    assert found.head == 6 * 20 * 258 * 4 + 258 * 32 * 4


def test_an_only_pass_is_at_its_end_before_its_gradients_are(tiny_folder, monkeypatch):
    """But the head's; all of them are there beside a second pass, or a second rank."""
    many, one = (
        plan.memory(recipe(tiny_folder, f"train.tokens_per_microbatch={budget}"), prompt_tokens=10)
        for budget in (269, 270)
    )
    assert (many.held, one.held) == (many.gradients, 258 * 32 * 4)
    lasting = one.process + one.weights + one.moments
    assert one.peak == one.training
    assert one.training == lasting + one.held + one.activations + one.copies + one.head
    # of a short pass the moment after it is the worst: all gradients, and copies not yet let go
    short = plan.Pass(Shape(prompts=[3], completions=[[2]]), alone=True)
    after = plan.memory(recipe(tiny_folder, "model.compute=bfloat16"), largest=short)
    resident = after.process + after.weights + after.moments
    assert after.training == resident + after.gradients + after.copies
    assert after.copies > 0
    monkeypatch.setattr(plan.dist, "world_size", lambda: 2)
    assert plan.memory(recipe(tiny_folder), prompt_tokens=10).held == many.gradients
    low = recipe(tiny_folder, "model.lora={rank = 2}", "train.tokens_per_microbatch=270")
    monkeypatch.setattr(plan.dist, "world_size", lambda: 1)
    assert plan.memory(low, prompt_tokens=10).held == 0


def test_a_micro_batch_that_is_known_is_counted(tiny_folder):
    """Of two groups, three completions; a step of the full size needs more, of nothing else."""
    small = Shape(prompts=[10, 4], completions=[[7, 2], [5]])
    largest = plan.Pass(small, alone=False)
    known = plan.memory(recipe(tiny_folder), prompt_tokens=10, largest=largest)
    full = plan.memory(recipe(tiny_folder), prompt_tokens=10)
    assert known.head == 14 * 258 * 4 + 258 * 32 * 4
    counted = footprint(str(tiny_folder), small)
    assert (known.activations, known.copies) == (counted.saved, counted.copies)
    assert known.activations < full.activations
    assert replace(known, activations=full.activations, head=full.head) == full


def test_the_head_keeps_logits_up_to_its_budget(tiny_folder, monkeypatch):
    """Eight completions of 20 tokens: 160 positions of 258 logits, and the gradient of the head."""
    trained = 258 * 32 * 4
    assert plan.memory(recipe(tiny_folder), prompt_tokens=10).head == 160 * 258 * 4 + trained
    monkeypatch.setattr(fused, "KEPT_BYTES", 100)
    monkeypatch.setattr(plan, "_CHUNK", 32)
    assert plan.memory(recipe(tiny_folder), prompt_tokens=10).head == 32 * 258 * 4 + trained
    own = plan.memory(recipe(tiny_folder, "model.products=native"), prompt_tokens=10)
    assert own.head == 32 * 258 * 4  # the gradient is added as it is made
    monkeypatch.setattr(plan.dist, "world_size", lambda: 2)
    own = plan.memory(recipe(tiny_folder, "model.products=native"), prompt_tokens=10)
    assert own.head == 32 * 258 * 4 + trained


def test_parts_follow_the_recipe(tiny_folder):
    plain = plan.memory(recipe(tiny_folder), prompt_tokens=10)
    assert (plain.moments, plain.gradients) == (2 * plain.weights, plain.weights)
    assert plain.reference == 0
    held = plan.memory(recipe(tiny_folder, "objective.kl={beta = 0.1}"), prompt_tokens=10)
    assert held.reference == plain.weights
    beta = ("objective.kl={beta = 0.1}", "model.compute=bfloat16")
    half = plan.memory(recipe(tiny_folder, *beta), prompt_tokens=10)
    model = load(str(tiny_folder)).model  # linear layers but for the head, which is the embedding
    cast = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("_proj"))
    assert half.reference == plain.weights - 2 * cast
    low = plan.memory(
        recipe(tiny_folder, "objective.kl={beta = 0.1}", "model.lora={rank = 2}"), prompt_tokens=10
    )
    assert low.reference == 0
    assert low.moments == 2 * low.gradients < plain.moments / 4
    assert "memory: about" in plain.text()


def test_reward_models_are_counted_once_where_the_policy_is(tiny_folder, tmp_path):
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_labels=1,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    # embedding, two layers of attention (4 squares), feed-forward (3 matrices) and norms, the end
    count = 258 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32 + 32
    judged = f'{{name = "a", kind = "reward_model", model = "{tmp_path}", tokens_per_batch = 100}}'
    halved = judged.replace('"a"', '"b"').replace("100", '50, dtype = "bfloat16"')
    elsewhere = judged.replace('"a"', '"c"').replace("100", '100, device = "meta"')
    again = judged.replace('"a"', '"d"')
    parts = ", ".join((judged, halved, elsewhere, again))
    found = plan.memory(
        recipe(tiny_folder, f"reward={{task = 'a', parts = [{parts}]}}"), prompt_tokens=10
    )
    plain = plan.memory(recipe(tiny_folder), prompt_tokens=10)
    assert (plain.judges, plain.judging) == (0, 0)
    assert found.judges == count * (4 + 2)
    assert found.judging == 100 * (6 * 32 + 3 * 64) * 4
    assert found.training - found.process == plain.training - plain.process + found.judges
