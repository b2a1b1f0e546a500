"""Golden aggregation: row coefficients, empty rows, garbage under the mask, splits."""

from collections.abc import Callable

import pytest
import torch

from gruppo.objective.weights import (
    Constant,
    LocalTokenMean,
    PromptMean,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    TokenMean,
    Totals,
    Weights,
    aggregate,
)

Golden = Callable[[str], dict]


def modes(length: int) -> dict[str, Weights]:
    records = (
        TokenMean(),
        SeqMeanTokenMean(),
        SeqMeanTokenSum(),
        Constant(length=length),
        PromptMean(),
    )
    return {record.kind: record for record in records}


def mask_of(inputs: dict) -> torch.Tensor:
    return torch.tensor(inputs["mask"]).bool()


def loss_of(inputs: dict) -> torch.Tensor:
    """Loss values; a null is NaN at even positions and inf at odd ones."""
    values = [
        [(float("nan"), float("inf"))[t % 2] if v is None else v for t, v in enumerate(row)]
        for row in inputs["loss"]
    ]
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "name", ["agg/all_modes", "agg/empty_row", "agg/all_masked", "agg/garbage_under_mask"]
)
def test_value_and_gradient(golden: Golden, name: str) -> None:
    case = golden(name)
    mask, group = mask_of(case["inputs"]), torch.tensor(case["inputs"]["group_ids"])
    table = modes(case["inputs"]["L_max"])
    assert table.keys() == case["expected"].keys()
    for kind, expected in case["expected"].items():
        loss = loss_of(case["inputs"])
        weights = table[kind](mask, group, Totals.of(mask, group))
        value = aggregate(loss, weights)
        assert value.item() == pytest.approx(expected, abs=case["tol"])
        (gradient,) = torch.autograd.grad(value, loss)
        assert torch.equal(gradient, weights)
        assert gradient[~mask].abs().sum().item() == 0.0


def test_row_coefficients(golden: Golden) -> None:
    case = golden("agg/row_coefficients")
    mask, group = mask_of(case["inputs"]), torch.tensor(case["inputs"]["group_ids"])
    for kind, expected in case["expected"].items():
        weights = modes(case["inputs"]["L_max"])[kind](mask, group, Totals.of(mask, group))
        wanted = torch.tensor(expected, dtype=torch.float64)[:, None].expand(4, 4).where(mask, 0.0)
        torch.testing.assert_close(weights, wanted, rtol=0.0, atol=case["tol"])


def test_microbatches_add_up(golden: Golden) -> None:
    case = golden("agg/microbatch_invariance")
    inputs, expected = case["inputs"], case["expected"]
    mask, group, loss = mask_of(inputs), torch.tensor(inputs["group_ids"]), loss_of(inputs)
    totals = Totals.of(mask, group)
    parts, local = [], []
    for rows in inputs["micro_batches"]:
        part = mask[rows], group[rows]
        parts.append(aggregate(loss[rows], TokenMean()(*part, totals)).item())
        # A micro-batch that takes itself for the whole step gives its own token mean.
        local.append(aggregate(loss[rows], LocalTokenMean()(*part, Totals.of(*part))).item())
    assert parts == pytest.approx(expected["per_micro_contribution"], abs=case["tol"])
    assert sum(parts) == pytest.approx(expected["token_mean_global"], abs=case["tol"])
    assert sum(local) / len(local) == pytest.approx(
        expected["wrong_mean_of_local_means"], abs=case["tol"]
    )


def test_local_token_mean_divides_by_equal_microbatches(golden: Golden) -> None:
    inputs = golden("agg/microbatch_invariance")["inputs"]
    mask, group, loss = mask_of(inputs), torch.tensor(inputs["group_ids"]), loss_of(inputs)
    totals = Totals.of(mask, group)
    halves = [
        aggregate(loss[rows], LocalTokenMean()(mask[rows], group[rows], totals)).item()
        for rows in ([0, 1], [2, 3])
    ]
    # Token means of the halves: (1.0 + 1.1)/6 and (3.0 + 4.3)/6, each counted with 1/2.
    assert halves == pytest.approx([2.1 / 12, 7.3 / 12], abs=1e-12)
    whole = aggregate(loss, LocalTokenMean()(mask, group, totals)).item()
    assert whole == pytest.approx(9.4 / 12, abs=1e-12)


def test_ranks_average(golden: Golden) -> None:
    case = golden("agg/dp_invariance")
    mask, loss = mask_of(case["inputs"]), loss_of(case["inputs"])
    group = torch.zeros(4, dtype=torch.int64)
    totals, size = Totals.of(mask, group), case["inputs"]["dp_size"]
    ranks = [
        size * aggregate(loss[rows], TokenMean()(mask[rows], group[rows], totals)).item()
        for rows in case["inputs"]["ranks"]
    ]
    assert ranks == pytest.approx(case["expected"]["rank_loss_times_dp"], abs=case["tol"])
    assert sum(ranks) / size == pytest.approx(case["expected"]["mean_over_ranks"], abs=case["tol"])


def test_length_bias(golden: Golden) -> None:
    case = golden("agg/dr_grpo_length_bias")
    lengths = torch.tensor(case["inputs"]["lengths"])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    group = torch.zeros(4, dtype=torch.int64)
    advantage = torch.tensor(case["inputs"]["A"], dtype=torch.float64)
    for kind, expected in case["expected"]["per_token_weight"].items():
        weights = modes(case["inputs"]["L_max"])[kind](mask, group, Totals.of(mask, group))
        per_token = weights[:, 0] * advantage
        assert per_token.tolist() == pytest.approx(expected, abs=case["tol"])


def test_constant_needs_its_length() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="max_tokens"):
        Constant()(
            mask,
            torch.zeros(1, dtype=torch.int64),
            Totals(tokens=2, rows=1, prompts=1, group_tokens=torch.tensor([2])),
        )
    with pytest.raises(ValueError, match="length = 0"):
        Constant(length=0)
