"""Aggregation as numbers: the weight of every token's loss in one optimizer step.

The loss of a step is Σ_i c_i Σ_t m_it x_it. Every aggregation mode is a choice of the row
coefficient c_i from counts over the *whole* step (all micro-batches, all ranks), so the losses of
micro-batches and ranks simply add up: nothing is divided later. Weights are float64 (cast once,
when they meet the loss). This module sees masks and counts, never a loss value.

With N trained tokens, B rows, P prompts, n_i tokens in row i and N_g in its group, over the step:

| record | c_i | used by |
|---|---|---|
| ``TokenMean`` | 1/N | DAPO, arXiv 2503.14476; CISPO |
| ``SeqMeanTokenMean`` | 1/(B n_i) | GRPO, arXiv 2402.03300; GSPO; SAPO |
| ``SeqMeanTokenSum`` | 1/B | Dr. GRPO's equation, arXiv 2503.20783; RLOO |
| ``Constant`` | 1/(B·length) | Dr. GRPO's code |
| ``PromptMean`` | 1/(P N_g) | DAPO's equation as printed; ScaleRL, arXiv 2510.13786 |
| ``LocalTokenMean`` | (rows here/B)/(tokens here) | TRL's "bnpo" |

Rows without trained tokens weigh nothing but count in B (and their prompt in P); a step without
any trained token has weights 0 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def count_groups(
    mask: Bool[Tensor, "B T"], group: Int[Tensor, "B"], num_groups: int | None = None
) -> Int[Tensor, "2 P"]:
    """Rows and trained tokens of every group id: the counts that add up over ranks.

    Args:
        mask: Trained tokens.
        group: Group id of every row.
        num_groups: Length P of the result; the largest id + 1 if left away. Ranks that add their
            counts must agree on it.

    Example:
        >>> count_groups(torch.tensor([[True, True], [True, False]]), torch.tensor([1, 0]))
        tensor([[1, 1],
                [1, 2]])
    """
    if num_groups is None:
        num_groups = int(group.max()) + 1 if group.numel() else 0
    counts = torch.zeros(2, num_groups, dtype=torch.int64, device=group.device)
    values = torch.stack([torch.ones_like(group), mask.sum(1).to(group)]).to(torch.int64)
    return counts.index_add(1, group, values)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Totals:
    """Counts over one whole optimizer step: all micro-batches of all ranks.

    ``tokens`` N, ``rows`` B and ``prompts`` P are integers; ``group_tokens[g]`` are the trained
    tokens of group id g.
    """

    tokens: int
    rows: int
    prompts: int
    group_tokens: Int[Tensor, "P"]

    @staticmethod
    def of(mask: Bool[Tensor, "B T"], group: Int[Tensor, "B"]) -> Totals:
        """Count these rows alone (a step that one process holds entirely).

        >>> Totals.of(torch.tensor([[True, True], [True, False]]), torch.tensor([0, 0])).tokens
        3
        """
        return Totals.from_counts(count_groups(mask, group))

    @staticmethod
    def from_counts(counts: Int[Tensor, "2 P"]) -> Totals:
        """Totals from the sum over ranks of ``count_groups``; a group may span ranks."""
        rows, tokens = counts
        return Totals(
            tokens=int(tokens.sum()),
            rows=int(rows.sum()),
            prompts=int((rows > 0).sum()),
            group_tokens=tokens,
        )


@runtime_checkable
class Weights(Protocol):
    """An aggregation mode."""

    def __call__(
        self, mask: Bool[Tensor, "B T"], group: Int[Tensor, "B"], totals: Totals
    ) -> Float[Tensor, "B T"]:
        """Weight of every token of these rows (any part of the step), 0 where not trained."""
        ...


def aggregate(values: Float[Tensor, "B T"], weights: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Σ c·x over the tokens that weigh something.

    The others are dropped before the product, so that NaN or inf there (0·inf = NaN) reaches
    neither the sum nor the gradient.

    >>> aggregate(torch.tensor([[2.0, float("nan")]]), torch.tensor([[0.5, 0.0]]))
    tensor(1.)
    """
    return (values.where(weights != 0.0, 0.0) * weights).sum()


def _spread(coefficient: Float[Tensor, "B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Row coefficients on the trained tokens, 0 elsewhere."""
    return coefficient[:, None].where(mask, 0.0)


def _same(value: float, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """One coefficient for all rows."""
    return _spread(torch.full(mask.shape[:1], value, dtype=torch.float64, device=mask.device), mask)


def _inverse(count: int) -> float:
    """1/count, and 0 for a step in which there is nothing to count."""
    return 1.0 / count if count > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMean:
    """Every trained token of the step weighs the same: c = 1/N.

    Example:
        >>> mask, group = torch.tensor([[True, True], [True, False]]), torch.tensor([0, 0])
        >>> TokenMean()(mask, group, Totals.of(mask, group))
        tensor([[0.3333, 0.3333],
                [0.3333, 0.0000]], dtype=torch.float64)
    """

    kind: Literal["token_mean"] = "token_mean"

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(
        self, mask: Bool[Tensor, "B T"], group: Int[Tensor, "B"], totals: Totals
    ) -> Float[Tensor, "B T"]:
        """Weights [B, T]."""
        return _same(_inverse(totals.tokens), mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqMeanTokenMean:
    """Mean over rows of the mean over tokens: c_i = 1/(B n_i).

    A token of a short completion weighs more than one of a long completion: long wrong answers
    are punished too little, and completions grow (arXiv 2503.20783, §3.1).
    """

    kind: Literal["seq_mean_token_mean"] = "seq_mean_token_mean"

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(
        self, mask: Bool[Tensor, "B T"], group: Int[Tensor, "B"], totals: Totals
    ) -> Float[Tensor, "B T"]:
        """Weights [B, T]."""
        per_row = (totals.rows * mask.sum(1)).clamp(min=1).double()
        return _spread(per_row.reciprocal(), mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqMeanTokenSum:
    """Mean over rows of the sum over tokens: c = 1/B."""

    kind: Literal["seq_mean_token_sum"] = "seq_mean_token_sum"

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(
        self, mask: Bool[Tensor, "B T"], group: Int[Tensor, "B"], totals: Totals
    ) -> Float[Tensor, "B T"]:
        """Weights [B, T]."""
        return _same(_inverse(totals.rows), mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """Sum over tokens, over a constant: c = 1/(B·length), with ``length`` in tokens.

    Absolute scale and no length bias. ``length = None`` stands for the token budget of a
    completion, which the recipe fills in; it must be a number when weights are computed.
    """

    kind: Literal["constant"] = "constant"
    length: int | None = None

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ValueError(f"weights constant: length = {self.length} must be at least 1 token")

    def __call__(
        self, mask: Bool[Tensor, "B T"], group: Int[Tensor, "B"], totals: Totals
    ) -> Float[Tensor, "B T"]:
        """Weights [B, T]; ValueError if ``length`` was left open."""
        if self.length is None:
            raise ValueError(
                "weights constant: length is not set; give the completion's token budget, "
                "Constant(length=max_tokens), because padding must not change the loss"
            )
        return _same(_inverse(totals.rows * self.length), mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptMean:
    """Mean over prompts of the token mean of the group: c_i = 1/(P N_g)."""

    kind: Literal["prompt_mean"] = "prompt_mean"

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(
        self, mask: Bool[Tensor, "B T"], group: Int[Tensor, "B"], totals: Totals
    ) -> Float[Tensor, "B T"]:
        """Weights [B, T]."""
        tokens = totals.group_tokens.to(mask.device)[group.to(mask.device)]
        per_row = (totals.prompts * tokens).clamp(min=1).double()
        return _spread(per_row.reciprocal(), mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTokenMean:
    """Mean over micro-batches of their own token means; *depends on how the step is split*.

    c = (rows here / B) / (trained tokens here), where "here" is the set of rows of this call. With
    K micro-batches of equally many rows that is 1/(K·tokens), TRL's "bnpo"; with one, it is
    ``TokenMean``. Only for comparison with runs of that kind: all other modes give the same
    gradient for every split.
    """

    kind: Literal["local_token_mean"] = "local_token_mean"

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(
        self, mask: Bool[Tensor, "B T"], group: Int[Tensor, "B"], totals: Totals
    ) -> Float[Tensor, "B T"]:
        """Weights [B, T] of one micro-batch."""
        share = mask.shape[0] * _inverse(totals.rows)
        return _same(share * _inverse(int(mask.sum())), mask)
