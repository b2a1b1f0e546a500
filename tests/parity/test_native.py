"""The compiled kernels equal plain torch."""

import ctypes
import platform

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from gruppo import native
from gruppo.model.logprob import completion_logp
from gruppo.native import compiled as building
from gruppo.types import Sampling
from support.engines import TINY

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler here")


def expected(
    query: Tensor, keys: list[Tensor], values: list[Tensor], *, scaling: float, window: int | None
) -> Tensor:
    """Attention row by row in float64: row n over keys[n] [K, S, D]."""
    rows = []
    for q, k, v in zip(query.double(), keys, values, strict=True):
        k, v = (x.double() if window is None else x.double()[:, -window:] for x in (k, v))
        heads = q.view(len(k), -1, q.shape[-1])
        rows.append((torch.softmax(heads @ k.mT * scaling, -1) @ v).flatten(0, 1))
    return torch.stack(rows)


def attend_case(
    dtype: torch.dtype, width: int, repeats: int, *, columns: int = 11
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Buffers and lengths of seven rows; those of one prompt do not stand side by side."""
    torch.manual_seed(0)
    query = torch.randn(7, 2 * repeats, width)
    prompts, own = torch.randn(2, 3, 2, columns, width), torch.randn(2, 9, 2, columns + 2, width)
    place = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    lengths = {
        "place": place,
        "prompt_length": torch.tensor([columns, columns // 3 + 1, columns - 4])[place],
        "own_length": torch.tensor([0, 1, 2, 5, columns + 1, columns - 4, 3]),
    }
    return [x.to(dtype) for x in (query, *prompts, *own)], lengths


def assert_attends(
    buffers: list[Tensor], lengths: dict[str, Tensor], *, window: int | None
) -> None:
    """Within float32's rounding, and where the result is in bfloat16 its last half unit."""
    query, *kept = buffers
    prompt_keys, prompt_values, own_keys, own_values = kept
    keys, values = (
        [
            torch.cat([prompt[p, :, :n], own[row, :, : m + 1]], dim=1)
            for row, (p, n, m) in enumerate(zip(*lengths.values(), strict=True))
        ]
        for prompt, own in ((prompt_keys, own_keys), (prompt_values, own_values))
    )
    got = native.decode_attention(query, *kept, **lengths, scaling=0.3, window=window)
    wanted = expected(query, keys, values, scaling=0.3, window=window)
    rounding = 2.0**-8 if query.dtype == torch.bfloat16 else 0.0
    assert ((got.double() - wanted).abs() - rounding * wanted.abs()).max() < 3e-6


@needs_kernels
@pytest.mark.parametrize("width", [8, 64, 70, 80, 128])
@pytest.mark.parametrize("repeats", [1, 3, 8, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention(dtype: torch.dtype, repeats: int, width: int) -> None:
    for window in (None, 1, 5):
        assert_attends(*attend_case(dtype, width, repeats), window=window)


@needs_kernels
@pytest.mark.parametrize("window", [None, 40, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention_over_many_tokens(dtype: torch.dtype, window: int | None) -> None:
    assert_attends(*attend_case(dtype, 64, 3, columns=150), window=window)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    """To the last bit."""
    (query, *kept), lengths = attend_case(dtype, 70, 3, columns=40)
    for window in (None, 9):
        together = native.decode_attention(query, *kept, **lengths, scaling=0.3, window=window)
        for row in range(len(query)):
            prompts, own = kept[:2], [buffer[row : row + 1] for buffer in kept[2:]]
            alone = {name: value[row : row + 1] for name, value in lengths.items()}
            got = native.decode_attention(
                query[row : row + 1], *prompts, *own, **alone, scaling=0.3, window=window
            )
            assert torch.equal(got[0], together[row])


@needs_kernels
def test_attention_shows_broken_numbers() -> None:
    """A NaN in a key reaches the rows that see it, and no other."""
    (query, *kept), lengths = attend_case(torch.float32, 64, 3)
    kept[0][1, 0, 2, 5] = torch.nan  # of the second prompt, of the first key head
    kept[2][2, 1, 1, 7] = torch.nan  # own of the third row, of the second key head
    got = native.decode_attention(query, *kept, **lengths, scaling=0.3)
    broken = got.isnan().all(-1).view(7, 2, 3)
    assert torch.equal(broken, got.isnan().any(-1).view(7, 2, 3))
    assert broken[..., 0].nonzero().tolist() == [[1, 0], [2, 1], [4, 0]]
    assert torch.equal(broken.all(-1), broken.any(-1))


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("less", ["-mno-avx512bf16", "-mno-avx512f", "-mno-avx"])
def test_decode_attention_with_fewer_instructions(
    less: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older processor of this kind would run."""
    if platform.machine() != "x86_64":
        pytest.skip("instructions of x86-64")
    monkeypatch.setattr(building, "_FLAGS", (*building._FLAGS, less))
    for cached in (building.kernels, building.kernel):
        cached.cache_clear()
    try:
        assert building.kernels() is not None
        for dtype in (torch.float32, torch.bfloat16):
            for width, repeats, window in ((64, 3, None), (80, 1, 5), (70, 8, 7), (128, 37, 1)):
                case = attend_case(dtype, width, repeats, columns=40)
                assert_attends(*case, window=window)
    finally:
        for cached in (building.kernels, building.kernel):
            cached.cache_clear()


def softmax_case(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(rows, width) * 6
    return logits, torch.randint(0, width, (rows,)), torch.randn(2, rows)


@needs_kernels
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.5])
@pytest.mark.parametrize(("rows", "width"), [(7, 5003), (1, 1), (3, 2048), (2, 13)])
def test_softmax_in_value_and_gradient(rows: int, width: int, scale: float) -> None:
    """Against float64, entropy with and without a gradient of its own."""
    logits, tokens, given = softmax_case(rows, width)
    raw = logits.double().requires_grad_()
    full = torch.log_softmax(raw * scale, -1)
    wanted = full.gather(1, tokens[:, None])[:, 0], -(full.exp() * full).sum(-1)
    lse = torch.logsumexp(raw.detach() * scale, -1)
    logp, found_lse, entropy = native.pick(logits, tokens, scale=scale, entropy=True)
    assert (logp - wanted[0]).abs().max() < 3e-6 * max(1.0, float(logp.abs().max()))
    assert (found_lse - lse).abs().max() < 1e-6 * max(1.0, float(lse.abs().max()))
    assert (entropy - wanted[1]).abs().max() < 2e-6
    bare = native.pick(logits, tokens, scale=scale, entropy=False)
    assert torch.equal(bare[0], logp)
    assert bare[2].abs().max() == 0
    for used in (False, True):
        loss = (given[0] * wanted[0]).sum() + (given[1] * wanted[1]).sum() * used
        (gradient,) = torch.autograd.grad(loss, raw, retain_graph=True)
        made = native.pick_gradient_(
            logits.clone(),
            tokens,
            scale=scale,
            lse=found_lse,
            entropy=entropy,
            grad_logp=given[0],
            grad_entropy=given[1] if used else None,
        )
        assert (made - gradient).abs().max() < 2e-6 + 4e-7 * float(lse.abs().max())


@needs_kernels
def test_softmax_of_impossible_and_of_broken_logits() -> None:
    """-inf is a probability of 0, wherever it stands; NaN is not hidden."""
    logits, tokens, given = softmax_case(4, 5000)
    possible = torch.ones(5000, dtype=torch.bool)
    possible[:2100] = possible[3000:3010] = False  # the whole first block of the kernel
    tokens = torch.tensor([2500, 4999, 2100, 3500])
    logits[:, ~possible] = -torch.inf
    logp, lse, entropy = native.pick(logits, tokens, scale=1.0, entropy=True)
    full = torch.log_softmax(logits[:, possible].double(), -1)
    places = possible.cumsum(0)[tokens] - 1
    assert (logp - full.gather(1, places[:, None])[:, 0]).abs().max() < 5e-6
    assert (entropy + (full.exp() * full).sum(-1)).abs().max() < 2e-6
    made = native.pick_gradient_(
        logits.clone(),
        tokens,
        scale=1.0,
        lse=lse,
        entropy=entropy,
        grad_logp=given[0],
        grad_entropy=given[1],
    )
    assert made[:, ~possible].abs().max() == 0
    assert torch.isfinite(made).all()
    logits[1, 7] = torch.nan  # among -inf
    logits[2, 4000] = torch.nan
    logits[3] = -torch.inf
    broken = native.pick(logits, tokens, scale=1.0, entropy=True)
    assert [value.isnan().tolist() for value in broken] == [
        [False, True, True, True],
        [False, True, True, False],
        [False, True, True, True],
    ]


@needs_kernels
@pytest.mark.parametrize("used", [False, True])
def test_softmax_gradient_relatively(used: bool) -> None:
    """Of all probabilities that a float32 holds; with z = log p, and of an entropy that is 0."""
    logits = torch.linspace(-86.9, 0, 40_001)[None]
    made = native.pick_gradient_(
        logits.clone(),
        torch.tensor([40_000]),
        scale=1.0,
        lse=torch.zeros(1),
        entropy=torch.zeros(1),
        grad_logp=-torch.ones(1),
        grad_entropy=-torch.ones(1) if used else None,
    )
    z = logits.double()
    wanted = z.exp() * (1 + z if used else 1)
    apart = (made - wanted)[:, :-1] / wanted[:, :-1]
    near = (1 + z[:, :-1]).abs() > 0.1  # elsewhere the sum of both terms cancels out
    assert apart[near].abs().max() < (6e-7 if used else 3.1e-7)
    assert abs(float(made[0, -1])) == 0  # p - 1
    far = torch.tensor([[-87.1, -300.0, -torch.inf, 0.0]])
    none, one = torch.zeros(1), torch.ones(1)
    rest = {"lse": none, "entropy": none, "grad_logp": one, "grad_entropy": one if used else None}
    assert native.pick_gradient_(far, torch.tensor([3]), scale=1.0, **rest).abs().max() == 0


@needs_kernels
def test_softmax_takes_all_integers_and_refuses_other_floats() -> None:
    logits, tokens, _ = softmax_case(7, 301)
    wanted = native.pick(logits, tokens, scale=1.0, entropy=True)
    for kind in (torch.int32, torch.int16):
        got = native.pick(logits, tokens.to(kind), scale=1.0, entropy=True)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    rest = {"lse": wanted[1], "entropy": wanted[2], "grad_entropy": None}
    made = [
        native.pick_gradient_(
            logits.clone(), tokens.to(kind), scale=1.0, grad_logp=torch.ones(7), **rest
        )
        for kind in (torch.int64, torch.int32)
    ]
    assert torch.equal(*made)
    wide = torch.ones(7, dtype=torch.float64)
    with pytest.raises(AssertionError, match="all but logits is float32"):
        native.pick_gradient_(logits, tokens, scale=1.0, grad_logp=wide, **rest)


@needs_kernels
def test_scoring_takes_tokens_of_any_integer_type() -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING["llama"](**TINY)
    model = AutoModelForCausalLM.from_config(config)
    tokens, length = torch.randint(3, 97, (2, 5)), torch.tensor([5, 3])
    found = [
        completion_logp(model, [(4, 5), (6,)], tokens.to(kind), length).logp
        for kind in (torch.int64, torch.int32)
    ]
    assert torch.equal(*found)


@needs_kernels
def test_attention_and_rotation_refuse_other_indices() -> None:
    query, place = torch.randn(3, 2, 8), torch.zeros(3, dtype=torch.int64)
    prompts, own = torch.randn(2, 1, 2, 5, 8), torch.randn(2, 3, 2, 6, 8)
    right = {"place": place, "prompt_length": place + 5, "own_length": place}
    for name in right:
        wrong = {**right, name: right[name].int()}
        with pytest.raises(AssertionError, match="indices are int64"):
            native.decode_attention(query, *prompts, *own, scaling=1.0, **wrong)
    with pytest.raises(AssertionError, match="one type of numbers"):
        native.decode_attention(query, *prompts.double(), *own, scaling=1.0, **right)
    with pytest.raises(AssertionError, match="indices are int64"):
        native.rotate_and_keep(
            torch.randn(3, 6 * 8),
            *torch.randn(2, 3, 8),
            norms=(None, None),
            own_length=place.int(),
            own_keys=own[0],
            own_values=own[1],
        )


@needs_kernels
def test_results_do_not_depend_on_torchs_defaults() -> None:
    logits, tokens, _ = softmax_case(3, 50)
    uniform, rule = torch.rand(3, dtype=torch.float64), Sampling(max_tokens=1)
    wanted = [*native.pick(logits, tokens, scale=1.0, entropy=True)]
    wanted += native.sample(logits, uniform, rule) or ()
    assert len(wanted) == 5
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = [*native.pick(logits, tokens, scale=1.0, entropy=True)]
            got += native.sample(logits, uniform, rule) or ()
    finally:
        torch.set_default_dtype(before)
    assert [value.dtype for value in got] == [torch.float32] * 3 + [torch.int64, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@needs_kernels
@pytest.mark.parametrize("entropy", [True, False])
def test_softmax_reads_bfloat16_and_rounds_the_gradient_once(entropy: bool) -> None:
    logits, tokens, _ = softmax_case(7, 5001)
    half = logits.bfloat16()
    wanted = native.pick(half.float(), tokens, scale=0.7, entropy=entropy)
    got = native.pick(half, tokens, scale=0.7, entropy=entropy)
    assert [value.dtype for value in got] == [torch.float32] * 3
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(got, wanted, strict=True))
    torch.manual_seed(1)
    grad_logp, grad_entropy = torch.randn(2, 7)
    rest = {
        "lse": wanted[1],
        "entropy": wanted[2],
        "grad_logp": grad_logp,
        "grad_entropy": grad_entropy if entropy else None,
    }
    exact = native.pick_gradient_(half.float(), tokens, scale=0.7, **rest)
    rounded = native.pick_gradient_(half, tokens, scale=0.7, **rest).float()
    # half a unit in the last of eight places, and what float32 rounds before
    assert ((rounded - exact).abs() <= exact.abs() * (2**-8 + 1e-5) + 1e-12).all()


def test_heads_of_an_odd_width_attend_in_torch() -> None:
    assert not native.can_attend(torch.zeros(1, 2, 7))


def test_softmax_is_for_float32_and_bfloat16() -> None:
    assert not native.can_softmax(torch.zeros(1, 2, dtype=torch.float64))
    assert not native.can_softmax(torch.zeros(1, 2, dtype=torch.float16))


def test_no_compiler_means_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_COMPILERS", ("no-such-compiler",))
    building.kernels.cache_clear()
    try:
        assert building.kernels() is None
        assert not native.can_attend(torch.zeros(1))
    finally:
        building.kernels.cache_clear()


def test_turned_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRUPPO_NATIVE", "0")
    building.kernels.cache_clear()
    try:
        assert building.kernels() is None
    finally:
        building.kernels.cache_clear()


HUGE = 2**45  # floats that no address space of 47 bits holds


@needs_kernels
@pytest.mark.parametrize(
    ("name", "kinds", "arguments"),
    [
        ("sample_float32", "iifidfpppp", (1, HUGE, 1.0, 0, 1.0, 0.0)),
        ("norm_backward_float32", "iippppppppp", (1, HUGE)),
        ("rotate_float32", "iiiiiffppppppppp", (1, 1, 1, HUGE, 1, 0.0, 0.0, 1, 1, 1, 1, 1)),
        ("decode_attention_float32", "iiiiiiifppppppppp", (HUGE, 1, 1, 2, 1, 1, 0, 1.0)),
        ("multiply_transposed_float32", "iiiiiippp", (HUGE, 1, 1, 1, 1, 0)),
    ],
)
def test_work_that_finds_no_memory_is_an_error_and_no_end(name, kinds, arguments):
    """Nothing is read before there is room for all threads."""
    pointers = (None,) * (len(kinds) - len(arguments))
    with pytest.raises(MemoryError, match=f"{name}: not enough memory"):
        building.kernel(name, kinds, ctypes.c_int64)(*arguments, *pointers)


@needs_kernels
def test_a_completion_too_long_for_memory_is_an_error_and_no_end():
    """What threads need of their own is had before they start."""
    lengths = (ctypes.c_int64 * 1)(HUGE)
    places = (ctypes.c_int64 * 1)(0)
    one = (1, 1, 1, 2, 1, 1, 0, 1.0)
    run = building.kernel("decode_attention_float32", "iiiiiiifppppppppp", ctypes.c_int64)
    for prompt, own in ((lengths, places), (places, lengths)):
        with pytest.raises(MemoryError, match="decode_attention_float32"):
            run(*one, *(None,) * 5, places, prompt, own, None)
