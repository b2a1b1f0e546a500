"""What FlexAttention is told of packed groups, and when its results are used."""

import logging
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gruppo.model.attention import AttentionRule
from gruppo.model.flex import Flex, Trials, flex_attention, seen
from gruppo.model.packing import Packing, pack, packed_attention


def packed(prompts: list[int], counts: list[int]) -> Packing:
    """Neighbours of equal prompt length share it."""
    tokens = torch.zeros(len(counts), max(counts), dtype=torch.long)
    return pack([(1,) * n for n in prompts], tokens, counts)


def by_hand(prompts: list[int], counts: list[int], window: int | None) -> torch.Tensor:
    """What sees what, from (group, completion, position) of every token."""
    tokens: list[tuple[int, int, int]] = []
    for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        if row == 0 or prompt != prompts[row - 1]:
            group = row
            tokens += [(group, -1, at) for at in range(prompt)]
        tokens += [(group, row, prompt + at) for at in range(count - 1)]
    return torch.tensor(
        [
            [
                q[0] == k[0] and k[1] in (-1, q[1]) and 0 <= q[2] - k[2] < (window or 99)
                for k in tokens
            ]
            for q in tokens
        ]
    )


@pytest.mark.parametrize("window", [None, 1, 2])
def test_masks_of_all_small_layouts(window: int | None) -> None:
    for prompts in product((1, 2), repeat=3):
        for counts in product((1, 2, 3), repeat=3):
            packing = packed(list(prompts), list(counts))
            at = torch.arange(len(packing.ids))
            zero = torch.zeros((), dtype=torch.long)
            mask = seen(packing, window)(zero, zero, at[:, None], at[None])
            assert torch.equal(mask, by_hand(list(prompts), list(counts), window))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0), (3, 2.0)])
def test_results_are_those_of_calls_per_group(window: int | None, softcap: float | None) -> None:
    packing = packed([5, 5, 5, 2, 3, 3], [7, 1, 4, 3, 9, 2])
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, len(packing.ids), 8, generator=generator) for heads in (4, 2, 2)
    )
    rule = AttentionRule(0.4, window, softcap)
    expected = packed_attention(query, key, value, packing.groups, rule.attend, window=window)
    ours = flex_attention(
        query,
        key,
        value,
        packing,
        window=window,
        softcap=softcap,
        scaling=0.4,
        is_compiled=False,
    )
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5)
    assert list(packing.masks) == [window]  # made once


PACKING = packed([5, 5, 5, 2, 3, 3], [7, 1, 4, 3, 9, 2])
RULE = AttentionRule(0.4, 3, 2.0)
LAYER = (3, 2.0, 0.4)  # window, soft cap, scaling


def heads(*kinds: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(1, count, len(PACKING.ids), 8, generator=generator).to(kind)
        for count, kind in zip((4, 2, 2), kinds or (torch.float32,) * 3, strict=True)
    )
    return query, key, value


def per_group(query: Tensor, key: Tensor, value: Tensor, packing: Packing, **_: object) -> Tensor:
    return packed_attention(query, key, value, packing.groups, RULE.attend, window=RULE.window)


class Watched:
    """A stand-in for the kernel: counts calls and keeps their types; may spoil what it returns."""

    def __init__(self, flex: Flex = per_group) -> None:
        self.kinds: list[tuple[torch.dtype, ...]] = []
        self._flex = flex

    def __call__(self, *given: Tensor, **options: object) -> Tensor:
        self.kinds.append(tuple(tensor.dtype for tensor in given[:3]))
        return self._flex(*given, **options)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records]


def dense(
    *given: Tensor, window: int | None, softcap: float | None, scaling: float | None
) -> Tensor:
    """All by all, by the mask that FlexAttention is told (whose backward pass needs a GPU)."""
    *qkv, packing = given
    at = torch.arange(len(packing.ids))
    zero = torch.zeros((), dtype=torch.long)
    mask = seen(packing, window)(zero, zero, at[:, None], at[None])
    return AttentionRule(scaling, None, softcap).attend(*qkv, mask)


def test_an_equal_kernel_is_tried_once_and_used(caplog: pytest.LogCaptureFixture) -> None:
    flex = Watched(dense)
    trials = Trials(flex)
    expected = per_group(*heads(), PACKING)
    with caplog.at_level(logging.WARNING):
        for calls in (2, 3):
            mixed = trials.attend(heads(), PACKING, RULE.attend, LAYER)
            assert torch.allclose(mixed, expected, rtol=0, atol=1e-5)
            assert len(flex.kinds) == calls  # the trial is the first
    assert told(caplog) == []


def wrong_value(*given: Tensor, **options: object) -> Tensor:
    return per_group(*given, **options) * 1.1


def wrong_gradient(query: Tensor, *given: Tensor, **options: object) -> Tensor:
    return per_group(query.detach(), *given, **options) + query.transpose(1, 2) * 0


def not_a_number(*given: Tensor, **options: object) -> Tensor:
    out = per_group(*given, **options)
    return out + torch.where(torch.arange(out.shape[1]) == 4, torch.nan, 0)[:, None, None]


def nan_gradient(query: Tensor, *given: Tensor, **options: object) -> Tensor:
    query.register_hook(lambda gradient: gradient * torch.nan)
    return per_group(query, *given, **options)


def failing(*given: Tensor, **options: object) -> Tensor:
    raise TypeError("no such op\nand a long tale")


@pytest.mark.parametrize(
    ("flex", "reason"),
    [
        (wrong_value, "it differs by 1.0e-01"),
        (wrong_gradient, "it differs by 1.0e+00"),
        (not_a_number, "it differs by nan"),
        (nan_gradient, "it differs by nan"),
        (failing, "no such op"),
    ],
)
def test_a_wrong_kernel_is_refused_once(
    flex: Flex, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(flex)
    trials = Trials(watched)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert trials.attend(heads(), PACKING, RULE.attend, LAYER) is None
    assert len(watched.kinds) == 1
    assert told(caplog) == [f"training without FlexAttention: {reason}"]


def test_another_kind_of_layer_has_its_own_trial() -> None:
    """Window 3 is what the calls per group do here; with window 2, they differ from the kernel."""
    trials = Trials(per_group)
    assert trials.attend(heads(), PACKING, AttentionRule(0.4, 2, 2.0).attend, (2, 2.0, 0.4)) is None
    mixed = trials.attend(heads(), PACKING, RULE.attend, LAYER)
    assert torch.equal(mixed, per_group(*heads(), PACKING))


def later(error: Exception) -> Watched:
    """Right in the trial, and never again."""

    def flex(*given: Tensor, **options: object) -> Tensor:
        if len(watched.kinds) > 1:
            raise error
        return per_group(*given, **options)

    watched = Watched(flex)
    return watched


def test_a_call_that_fails_later_is_the_last(caplog: pytest.LogCaptureFixture) -> None:
    flex = later(ValueError("a shape it cannot do"))
    trials = Trials(flex)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert trials.attend(heads(), PACKING, RULE.attend, LAYER) is None
    assert len(flex.kinds) == 2
    assert told(caplog) == ["training without FlexAttention: a shape it cannot do"]


def test_memory_that_runs_out_is_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    """And says nothing of the kernel: neither in a trial nor later."""
    error = torch.OutOfMemoryError("CUDA out of memory")
    failures = [error]

    def flex(*given: Tensor, **options: object) -> Tensor:
        if failures:
            raise failures.pop()
        return per_group(*given, **options)

    trials = Trials(flex)
    expected = per_group(*heads(), PACKING)
    for _ in range(2):  # a trial; then a call
        with pytest.raises(torch.OutOfMemoryError):
            trials.attend(heads(), PACKING, RULE.attend, LAYER)
        assert torch.equal(trials.attend(heads(), PACKING, RULE.attend, LAYER), expected)
        failures.append(error)
    assert told(caplog) == []


def test_autocast_casts_all_three() -> None:
    """Rotated queries and keys are float32 under autocast, values are not."""
    single, half = torch.float32, torch.bfloat16
    flex = Watched()
    trials = Trials(flex)
    mixed = heads(single, single, half)
    assert trials.attend(mixed, PACKING, RULE.attend, LAYER) is None
    assert flex.kinds == []
    with torch.autocast("cpu", torch.bfloat16):
        ours = trials.attend(mixed, PACKING, RULE.attend, LAYER)
        assert torch.equal(ours, per_group(*(tensor.to(half) for tensor in mixed), PACKING))
    assert flex.kinds == [(half,) * 3] * 2


def test_a_trial_within_a_checkpoint_is_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The first pass tries, the second one does not; it ends as soon as it has what it needs."""
    trials = Trials(per_group)

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = trials.attend((query * 2, key, value), PACKING, RULE.attend, LAYER)
        assert isinstance(mixed, Tensor), "trusted"
        return mixed

    given = [tensor.requires_grad_() for tensor in heads()]
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    ours = (checkpoint(layer, *given, use_reentrant=False) * weight).sum()
    found = torch.autograd.grad(ours, given)
    wanted = torch.autograd.grad((layer(*given) * weight).sum(), given)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert told(caplog) == []
