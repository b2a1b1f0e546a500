"""Policy: updates, references, state and export of a tiny model."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gruppo.model import (
    Loaded,
    Lora,
    attach,
    completion_logp,
    is_adapted,
    load,
    merged_weights,
)
from gruppo.policy import Optim, Policy

PROMPTS = [[5, 6, 7], [8, 9]]
LENGTH = torch.tensor([4, 3])
SETTINGS = Optim(lr=1e-2, warmup_steps=2, weight_decay=0.01, schedule="cosine")
Make = Callable[..., Policy]


def tokens(step: int = 0) -> Tensor:
    return torch.randint(0, 258, (2, 4), generator=torch.Generator().manual_seed(step))


@pytest.fixture(scope="module")
def opened(tiny_folder: Path) -> Loaded:
    return load(str(tiny_folder))


@pytest.fixture
def make(opened: Loaded) -> Make:
    """A fresh policy of the tiny model; ``lora`` gives it an adapter."""

    def build(*, lora: Lora | None = None, dtype: torch.dtype = torch.float32, **options) -> Policy:
        torch.manual_seed(3)
        model = copy.deepcopy(opened.model).to(dtype)
        if lora is not None:
            model = attach(model, lora, compute_dtype=options.get("compute_dtype", dtype))
        settings = {"optim": SETTINGS, "total_updates": 10, "compute_dtype": dtype}
        return Policy(model, **{**settings, **options})

    return build


def train(policy: Policy, steps: range) -> list[float]:
    """Some updates towards fixed tokens (two micro-batches each); gradient norms."""
    norms = []
    for step in steps:
        for row in (0, 1):
            scored = policy.logp([PROMPTS[row]], tokens(step)[row : row + 1], LENGTH[row : row + 1])
            policy.backward(-scored.logp.sum() / 7)
        norms.append(policy.step().grad_norm)
    return norms


def snapshot(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def test_an_update_raises_the_probability_of_what_was_rewarded(make: Make) -> None:
    policy = make()
    before = policy.old_logp(PROMPTS, tokens(), LENGTH).logp
    scored = policy.logp(PROMPTS, tokens(), LENGTH, entropy=True)
    assert torch.equal(scored.logp.detach(), before), "on-policy ratios are exactly 1"
    assert not before.requires_grad
    policy.backward(-scored.logp.sum())
    report = policy.step()
    assert not report.skipped
    assert report.lr == pytest.approx(5e-3)
    assert policy.version == 1
    assert all(p.grad is None for p in policy.model.parameters())
    assert not policy.model.training
    assert policy.old_logp(PROMPTS, tokens(), LENGTH).logp.sum() > before.sum() + 0.1


def test_update_ratio_is_the_change_of_the_weights(make: Make) -> None:
    policy = make(dtype=torch.float64)
    before = torch.cat([p.flatten() for p in snapshot(policy).values()])
    policy.backward(-policy.logp(PROMPTS, tokens(), LENGTH).logp.sum())
    report = policy.step()
    after = torch.cat([p.flatten() for p in snapshot(policy).values()])
    measured = float((after - before).norm() / after.norm())
    assert report.update_ratio == pytest.approx(measured, rel=1e-9)


def test_clipping_bounds_what_the_optimizer_sees(make: Make) -> None:
    """The first moment after one step is (1 - beta1) times the clipped gradient."""
    policy = make(optim=Optim(grad_clip=0.5, betas=(0.9, 0.95)))
    policy.backward(-100 * policy.logp(PROMPTS, tokens(), LENGTH).logp.sum())
    report = policy.step()
    assert report.grad_norm > 100
    moments = [t for name, t in policy.state()[0].items() if name.startswith("optim.exp_avg.")]
    norm = torch.cat([t.flatten() for t in moments]).norm()
    assert float(norm) == pytest.approx(0.1 * 0.5, rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(make: Make, bad: float) -> None:
    policy = make()
    train(policy, range(2))
    before, (state, scalars) = snapshot(policy), policy.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    scored = policy.logp(PROMPTS, tokens(), LENGTH)
    policy.backward((scored.logp * bad).sum())
    report = policy.step()
    assert report.skipped
    assert report.update_ratio == 0.0
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    again, scalars_after = policy.state()
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())
    assert scalars_after == scalars == {"version": 2, "reference_updates": 0}
    # and the next good gradient counts as if nothing had been
    assert train(policy, range(2, 3)) == train_from_scratch(make, 3)[2:]


def train_from_scratch(make: Make, steps: int) -> list[float]:
    return train(make(), range(steps))


def test_an_infinite_weight_skips_the_step(make: Make) -> None:
    """Broken logits reach the gradient, and stop there."""
    policy = make()
    with torch.no_grad():
        next(policy.model.parameters())[5, 0] = float("inf")
    policy.backward(-policy.logp(PROMPTS, tokens(), LENGTH).logp.sum())
    assert policy.step().skipped
    assert policy.version == 0


def test_discarded_gradients_have_no_effect(make: Make) -> None:
    policy = make()
    policy.backward(policy.logp(PROMPTS, tokens(9), LENGTH).logp.sum())
    policy.discard_gradient()
    assert train(policy, range(2)) == train_from_scratch(make, 2)


LORA = Lora(rank=4, alpha=8)


@pytest.mark.parametrize(
    ("lora", "reference"), [(None, "none"), (None, "copy"), (LORA, "adapter"), (LORA, "copy")]
)
def test_training_resumes_bit_for_bit(
    make: Make, tmp_path: Path, lora: Lora | None, reference: str
) -> None:
    unbroken = make(lora=lora, reference=reference)
    first = train(unbroken, range(3))
    if reference == "copy":
        unbroken.sync_reference(0.5)
    tensors, scalars = unbroken.state()
    save_file(tensors, tmp_path / "state.safetensors")
    text = json.dumps(scalars)
    rest = train(unbroken, range(3, 6))

    resumed = make(lora=lora, reference=reference)
    resumed.restore(load_file(tmp_path / "state.safetensors"), json.loads(text))
    assert resumed.version == 3
    assert train(resumed, range(3, 6)) == rest
    for (name, p), q in zip(snapshot(unbroken).items(), snapshot(resumed).values(), strict=True):
        assert torch.equal(p, q), name
    for (name, p), q in zip(unbroken.state()[0].items(), resumed.state()[0].values(), strict=True):
        assert torch.equal(p, q), name
    if reference != "none":
        mine = resumed.ref_logp(PROMPTS, tokens(), LENGTH).logp
        assert torch.equal(mine, unbroken.ref_logp(PROMPTS, tokens(), LENGTH).logp)
    assert len(first) == 3


def test_a_state_of_another_model_is_refused_and_nothing_changed(make: Make) -> None:
    policy = make()
    train(policy, range(1))
    tensors, scalars = policy.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    before = snapshot(policy)
    missing = dict(list(tensors.items())[1:])
    with pytest.raises(ValueError, match="tensors missing or unknown"):
        policy.restore(missing, scalars)
    with pytest.raises(ValueError, match="tensors missing or unknown, optim"):
        policy.restore({**tensors, "optim.extra": torch.zeros(1)}, scalars)
    name = "model.model.norm.weight"
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(3,\), this model needs"):
        policy.restore({**tensors, name: torch.zeros(3)}, scalars)
    with pytest.raises(ValueError, match="does not fit this model, adapter or reference"):
        make(lora=LORA).restore(tensors, scalars)
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


@pytest.mark.parametrize(("lora", "reference"), [(None, "copy"), (LORA, "adapter"), (LORA, "copy")])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_policy_as_it_was(
    make: Make, lora: Lora | None, reference: str, compute: torch.dtype
) -> None:
    """Bit-equal at first, in bfloat16 too, and unmoved by training."""
    policy = make(lora=lora, reference=reference, compute_dtype=compute)
    initial = policy.old_logp(PROMPTS, tokens(), LENGTH).logp
    assert torch.equal(policy.ref_logp(PROMPTS, tokens(), LENGTH).logp, initial)
    train(policy, range(3))
    assert torch.equal(policy.ref_logp(PROMPTS, tokens(), LENGTH).logp, initial)
    moved = policy.old_logp(PROMPTS, tokens(), LENGTH).logp
    assert (moved - initial).abs().max() > 0.05


def test_frozen_products_are_held_in_bfloat16(make: Make) -> None:
    policy = make(lora=LORA, reference="adapter", compute_dtype=torch.bfloat16)
    kinds = {
        (
            "lora" if "lora_" in name else name.split(".")[-3 if "base_layer" in name else -2]
        ): p.dtype
        for name, p in policy.model.named_parameters()
    }
    assert kinds["lora"] == kinds["embed_tokens"] == kinds["norm"] == torch.float32
    assert kinds["q_proj"] == kinds["down_proj"] == torch.bfloat16


def test_sync_moves_the_reference(make: Make, golden) -> None:
    policy = make(reference="copy", dtype=torch.float64)
    start = snapshot(policy)
    train(policy, range(2))
    case = golden("ctl/ref_ema")
    alpha = case["inputs"]["alpha"]
    policy.sync_reference(alpha)
    assert policy.reference_updates == 1
    for name, p in policy.model.named_parameters():
        held = policy.state()[0][f"reference.{name}"]
        torch.testing.assert_close(held, alpha * p.detach() + (1 - alpha) * start[name])
    policy.sync_reference()
    same = policy.ref_logp(PROMPTS, tokens(), LENGTH).logp
    assert torch.equal(same, policy.old_logp(PROMPTS, tokens(), LENGTH).logp)


def test_temperature_is_that_of_the_policy(make: Make) -> None:
    policy = make(temperature=0.7, reference="copy")
    expected = completion_logp(policy.model, PROMPTS, tokens(), LENGTH, temperature=0.7).logp
    for scored in (policy.logp, policy.old_logp, policy.ref_logp):
        torch.testing.assert_close(scored(PROMPTS, tokens(), LENGTH).logp, expected)


def test_senseless_references_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="needs a LoRA adapter"):
        make(reference="adapter")
    with pytest.raises(ValueError, match="has no reference"):
        make().ref_logp(PROMPTS, tokens(), LENGTH)
    with pytest.raises(ValueError, match="cannot be moved"):
        make(lora=LORA, reference="adapter").sync_reference()
    with pytest.raises(ValueError, match=r"mixup = 0.0 must lie in \(0, 1\]"):
        make(reference="copy").sync_reference(0.0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    with pytest.raises(ValueError, match="adapter_only: this model has no adapter"):
        make().save_pretrained(Path("unused"), tokenizer, adapter_only=True)


def greedy(model: torch.nn.Module) -> list[int]:
    ids = torch.tensor([PROMPTS[0]])
    out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    return out[0].tolist()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, LORA])
def test_plain_transformers_goes_on_with_the_saved_model(
    tiny_folder: Path, tmp_path: Path, lora: Lora | None, tied: bool
) -> None:
    source = tmp_path / "source"
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    config = plain.config
    config.tie_word_embeddings = tied
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(source)
    loaded = load(str(source))
    model = loaded.model if lora is None else attach(loaded.model, lora)
    policy = Policy(model, optim=Optim(lr=3e-2, warmup_steps=0), total_updates=10)
    untrained = greedy(policy.model)
    train(policy, range(5))
    policy.save_pretrained(tmp_path / "out", loaded.tokenizer)

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert greedy(again) == greedy(policy.model) != untrained
    held = again.state_dict()
    for name, tensor in policy.weights().items():
        torch.testing.assert_close(held[name], tensor, rtol=0, atol=1e-6)
    assert held.keys() == policy.weights().keys()
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert again.generation_config.eos_token_id == 256
    assert again.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    text = (tmp_path / "out" / "config.json").read_text()
    assert "gruppo" not in text
    assert str(tmp_path) not in text


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # peft's
def test_adapter_folder_loads_with_peft(make: Make, tiny_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = make(lora=LORA, optim=Optim(lr=3e-2, warmup_steps=0))
    train(policy, range(5))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    policy.save_pretrained(tmp_path, tokenizer, adapter_only=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None  # it was a folder
    assert config["target_modules"] == sorted(config["target_modules"])
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert greedy(again) == greedy(policy.model)


def test_a_fresh_adapter_changes_nothing_and_merging_leaves_the_model(make: Make) -> None:
    plain, adapted = make(), make(lora=LORA)
    same = adapted.old_logp(PROMPTS, tokens(), LENGTH).logp
    assert torch.equal(same, plain.old_logp(PROMPTS, tokens(), LENGTH).logp)
    trainable = [n for n, p in adapted.model.named_parameters() if p.requires_grad]
    # 7 matrices in each of 2 layers, A and B; the head stays as it is
    assert len(trainable) == 28
    assert all("lora_" in name for name in trainable)
    train(adapted, range(2))
    before = adapted.old_logp(PROMPTS, tokens(), LENGTH).logp
    merged = merged_weights(adapted.model)
    assert torch.equal(adapted.old_logp(PROMPTS, tokens(), LENGTH).logp, before)
    plain.model.load_state_dict(merged)
    torch.testing.assert_close(plain.old_logp(PROMPTS, tokens(), LENGTH).logp, before)
    assert is_adapted(adapted.model)
    assert not is_adapted(plain.model)


def test_merging_computes_the_formula(make: Make) -> None:
    """W + (alpha / rank) B A."""
    policy = make(lora=Lora(rank=4, alpha=6, targets=("q_proj",)))
    train(policy, range(2))
    state = dict(policy.model.named_parameters())
    layer = "base_model.model.model.layers.1.self_attn.q_proj"
    a, b = state[f"{layer}.lora_A.default.weight"], state[f"{layer}.lora_B.default.weight"]
    expected = state[f"{layer}.base_layer.weight"] + 1.5 * b @ a
    merged = policy.weights()["model.layers.1.self_attn.q_proj.weight"]
    torch.testing.assert_close(merged, expected.detach(), rtol=0, atol=1e-7)
    assert (merged - state[f"{layer}.base_layer.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"rank": 0}, "lora.rank = 0"),
        ({"alpha": 0.0}, "lora.alpha"),
        ({"dropout": 1.0}, "lora.dropout"),
        ({"targets": ()}, "lora.targets is empty"),
    ],
)
def test_bad_adapters_are_refused(setting: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Lora(**setting)


def test_unknown_adapter_targets_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="nothing_like_that"):
        make(lora=Lora(targets=("nothing_like_that",)))


def test_adapter_dropout_is_off_outside_training(make: Make) -> None:
    policy = make(lora=Lora(rank=4, dropout=0.5))
    train(policy, range(3))
    calm = [policy.old_logp(PROMPTS, tokens(), LENGTH).logp for _ in range(2)]
    assert torch.equal(*calm)
    live = policy.logp(PROMPTS, tokens(), LENGTH).logp
    assert policy.model.training, "until the backward pass is done"
    assert (live - calm[0]).abs().max() > 1e-4
    policy.discard_gradient()
    assert not policy.model.training


def test_bfloat16_compute_keeps_float32_weights(make: Make) -> None:
    policy, exact = make(compute_dtype=torch.bfloat16), make()
    rounded = policy.logp(PROMPTS, tokens(), LENGTH).logp
    policy.backward(-rounded.sum())
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in policy.model.parameters()} == {torch.float32}
    error = (rounded - exact.old_logp(PROMPTS, tokens(), LENGTH).logp).abs().max()
    assert 0 < error < 0.05
