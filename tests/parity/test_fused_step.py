"""The short decode step gives the logits of the model's own forward, or is not taken."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from gruppo import native
from gruppo.engine.local import LocalEngine
from gruppo.engine.local.forward import forward
from gruppo.engine.local.fused import FusedStep
from gruppo.engine.local.module import generating
from gruppo.engine.local.packed import WORTHWHILE, packed_linears, plain_product
from gruppo.engine.local.probe import can_fuse
from gruppo.engine.local.schedule import Schedule, rows_of
from gruppo.engine.local.shared import Drawing
from gruppo.engine.local.store import Decode, Store
from gruppo.model import Products
from gruppo.model.attention import adopt
from gruppo.model.decoder import find_decoder
from gruppo.native import compiled as building
from gruppo.types import Completion, Sampling
from support.engines import TINY, letters, sharpen, unequal_groups

LIKE_LLAMA: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},  # with biases
    "qwen3": {},  # with norms of queries and keys
    "mistral": {"sliding_window": 6},
}
SAMPLING = Sampling(max_tokens=12, temperature=0.9, stop_tokens=(5, 17, 40, 60))
needs_kernels = pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler here")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Turns the kernels off when called, and on again after the test."""

    def turn_off() -> None:
        monkeypatch.setenv("GRUPPO_NATIVE", "0")
        building.kernels.cache_clear()

    yield turn_off
    building.kernels.cache_clear()


def build(name: str, **extra: object) -> nn.Module:
    config = CONFIG_MAPPING[name](**{**TINY, **extra})
    torch.manual_seed(0)
    model = sharpen(AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms are 1 and biases 0 at first
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def draw(model: nn.Module, **options: object) -> list[Completion]:
    engine = LocalEngine(model, letters, pad_token=0, **options)
    return [one for group in engine.generate(unequal_groups(), SAMPLING) for one in group]


def assert_same(left: list[Completion], right: list[Completion], bound: float = 2e-5) -> None:
    for ours, theirs in zip(left, right, strict=True):
        assert (ours.tokens, ours.finish) == (theirs.tokens, theirs.finish)
        assert ours.logp == pytest.approx(theirs.logp, abs=bound)


def gaps(
    model: nn.Module, dtype: torch.dtype, rows: int, *, packed: Products | None
) -> list[float]:
    """Relative difference of logits at every step of a call in which rows end and enter."""
    decoder = find_decoder(model)
    assert decoder
    asked, found = unequal_groups(), []
    with generating(model, dtype) as kept:
        store = Store(2, slots=rows, dtype=kept or next(model.parameters()).dtype)
        schedule = Schedule(rows_of(asked, [12] * 4), asked, max_rows=rows)

        def both(tokens: Tensor, positions: Tensor, step: Decode) -> Tensor:
            plain = forward(model, store, step, tokens[:, None], positions[:, None])[:, -1].double()
            ours = fused(tokens, positions, step)
            found.append(float((ours.double() - plain).abs().max() / plain.abs().max()))
            return ours

        drawing = Drawing(
            model, asked, schedule, sampling=SAMPLING, store=store, spoken=None, advance=both
        )
        if packed:
            with packed_linears(
                model, kept, rows=rows, together=decoder.together, products=packed
            ) as products:
                fused = FusedStep(decoder, products, store)
                while not schedule.is_done:
                    drawing.turn()
        else:
            fused = FusedStep(decoder, plain_product, store)
            while not schedule.is_done:
                drawing.turn()
    return found


def by_default(*names: str) -> list[object]:
    """All that are like Llama; the others are slow."""
    return [
        name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in LIKE_LLAMA
    ]


@needs_kernels
@pytest.mark.parametrize("name", by_default("llama", "mistral"))
@pytest.mark.parametrize("packed", ["torch", "native", pytest.param(None, marks=pytest.mark.slow)])
def test_logits_equal_the_models_own(name: str, packed: Products | None) -> None:
    model = build(name, **LIKE_LLAMA[name])
    adopt(model)
    for rows in (10, 3):
        found = gaps(model, torch.float32, rows, packed=packed)
        assert len(found) > 8
        assert max(found) < 5e-6


@needs_kernels
@pytest.mark.parametrize("name", by_default("qwen3"))
def test_logits_in_bfloat16(name: str) -> None:
    """Under autocast the step rounds where the model does; all in bfloat16, nearly so."""
    model = build(name, **LIKE_LLAMA[name])
    adopt(model)
    assert max(gaps(model, torch.bfloat16, 4, packed=None)) < 1e-2
    assert max(gaps(model.to(torch.bfloat16), torch.bfloat16, 4, packed=None)) < 3e-2


@needs_kernels
@pytest.mark.parametrize("name", by_default("qwen2"))
def test_draws_what_plain_waves_draw(name: str) -> None:
    model = build(name, **LIKE_LLAMA[name])
    expected = draw(model, kind="plain")
    adopt(model)
    assert can_fuse(model, torch.float32)
    for rows in (128, 4):
        assert_same(draw(model, max_rows=rows), expected)


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # qwen2 has biases
def test_draws_the_same_whatever_multiplies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough for packed matrices; prompts and decode steps, with the head."""
    model = build(name, **LIKE_LLAMA[name])
    adopt(model)
    made: list[int] = []
    step = native.DecodeLayers.step
    monkeypatch.setattr(
        native.DecodeLayers, "step", lambda *given, **more: made.append(1) or step(*given, **more)
    )
    found = {}
    for products in ("torch", "native"):
        engine = LocalEngine(model, letters, pad_token=0, products=products)
        groups = engine.generate(unequal_groups(), Sampling(max_tokens=WORTHWHILE))
        found[products] = [one for group in groups for one in group]
        assert bool(made) == (products == "native")
    assert_same(found["native"], found["torch"])


@needs_kernels
@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", list(LIKE_LLAMA))
def test_all_layers_in_one_call_are_the_same_bits(
    name: str, weights: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a call for each operation: with biases, head norms and a window; rows end and enter."""
    if not native.can_multiply(dtype):
        pytest.skip("no products in bfloat16 on this processor")
    model = build(name, **LIKE_LLAMA[name]).to(weights)
    adopt(model)
    found: list[list[Completion]] = []
    calls: list[int] = []
    step = native.DecodeLayers.step
    monkeypatch.setattr(
        native.DecodeLayers, "step", lambda *given, **more: calls.append(1) or step(*given, **more)
    )
    for together in (True, False):
        if not together:
            monkeypatch.setattr(native, "can_decode", lambda layers, dtype: False)
        engine = LocalEngine(
            model, letters, pad_token=0, products="native", max_rows=3, compute_dtype=dtype
        )
        groups = engine.generate(unequal_groups(), Sampling(max_tokens=WORTHWHILE))
        found.append([one for group in groups for one in group])
        assert bool(calls) == together
        calls.clear()
    for ours, theirs in zip(*found, strict=True):
        assert (ours.tokens, ours.logp) == (theirs.tokens, theirs.logp)


@pytest.mark.usefixtures("unchecked")
def test_what_multiplies_must_be_known() -> None:
    with pytest.raises(ValueError, match='products = \'blas\'; use "torch", "onednn" or'):
        LocalEngine(build("llama"), letters, pad_token=0, products="blas")


def test_without_kernels_the_models_own_forward_draws_the_same(
    no_kernels: Callable[[], None],
) -> None:
    model = build("llama")
    adopt(model)
    expected = draw(model)
    no_kernels()
    assert not can_fuse(model, torch.float32)
    assert_same(draw(model), expected)


def scale_residuals(model: nn.Module) -> nn.Module:
    class Louder(type(model.model.layers[0].mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return 1.5 * super().forward(x)

    model.model.layers[1].mlp.__class__ = Louder
    return model


def hook(model: nn.Module) -> nn.Module:
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, given, out: 1.1 * out)
    return model


def replace_forward(model: nn.Module) -> nn.Module:
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *given, **options: own(*given, **options) * 1.1
    return model


UNLIKE = {
    "phi3": lambda: build("phi3"),
    "gemma2": lambda: build("gemma2", sliding_window=6, query_pre_attn_scalar=8),
    "granite": lambda: build("granite", residual_multiplier=0.5, attention_multiplier=0.4),
    "cohere": lambda: build("cohere"),
    "gelu": lambda: build("llama", hidden_act="gelu"),
    "smollm3": lambda: build("smollm3", no_rope_layers=[1, 0]),  # one layer does not rotate
    "scaled residuals": lambda: scale_residuals(build("llama")),
    "a hook": lambda: hook(build("llama")),
    "a forward of its own": lambda: replace_forward(build("llama")),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_other_models_are_told_apart(name: str) -> None:
    model = UNLIKE[name]()
    adopt(model)
    assert not can_fuse(model, torch.float32)


@pytest.mark.parametrize(
    "name",
    [name if name == "gemma2" else pytest.param(name, marks=pytest.mark.slow) for name in UNLIKE],
)
def test_other_models_take_their_own_forward(name: str) -> None:
    model = UNLIKE[name]()
    expected = draw(model, kind="plain")
    adopt(model)
    assert_same(draw(model, max_rows=4), expected)


def test_a_hook_that_comes_later_is_seen() -> None:
    model = build("llama")
    adopt(model)
    engine = LocalEngine(model, letters, pad_token=0)
    before = engine.generate(unequal_groups(), SAMPLING)
    hook(model)
    assert find_decoder(model) is None
    after = [one for group in engine.generate(unequal_groups(), SAMPLING) for one in group]
    assert after != [one for group in before for one in group]
    assert_same(after, draw(model, kind="plain"))


@pytest.mark.parametrize("library", ["torch", "native"])
def test_matrices_packed_together_give_each_layer_its_own_product(library: Products) -> None:
    """Whatever the order of the calls; and all is as before afterwards."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 4), nn.Linear(6, 3, bias=False)
    model = nn.ModuleList([first, second, nn.Linear(3, 5)])
    rows, others = torch.randn(2, 7, 6)
    with torch.no_grad():
        wanted = [[layer(x) for layer in (first, second)] for x in (rows, others)]
        with packed_linears(
            model, None, rows=7, together=[(first, second)], products=library
        ) as products:
            got = [[layer(x) for layer in (first, second)] for x in (rows, others)]
            backwards = [second(rows), first(rows), first(others), second(rows)]
            whole = products((first, second))(rows)
        assert "forward" not in vars(first)
    for ours, theirs in zip([*got[0], *got[1]], [*wanted[0], *wanted[1]], strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    for ours, theirs in zip(
        backwards, [wanted[0][1], wanted[0][0], wanted[1][0], wanted[0][1]], strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert torch.allclose(whole, torch.cat(wanted[0], -1), rtol=0, atol=1e-6)
