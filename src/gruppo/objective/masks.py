"""Loss masks: which tokens are trained, and what becomes of truncated completions.

A mask selects tokens for the loss only; attention always sees every token that the model saw when
it sampled. Whether a completion *is* truncated is the engine's word where there is one; the end
token rule here is for data without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gruppo.types import Rollout


def mask_from_stop(
    tokens: Int[Tensor, "B T"], stop_tokens: Sequence[int]
) -> tuple[Bool[Tensor, "B T"], Int[Tensor, "B"], Bool[Tensor, "B"]]:
    """Mask, length and truncation of completions that end at their first stop token.

    The first stop token is trained; all after it is not. A row without one is truncated and
    counts to its full width.

    Args:
        tokens: Completions, padded to one width with anything after the end.
        stop_tokens: All ids that end a completion (chat models often have several).

    Returns:
        ``(mask, length, truncated)``; the length includes the stop token.

    Example:
        >>> mask_from_stop(torch.tensor([[5, 2, 2], [5, 6, 7]]), [2])
        (tensor([[ True,  True, False],
                [ True,  True,  True]]), tensor([2, 3]), tensor([False,  True]))
    """
    stop = torch.isin(tokens, torch.tensor(list(stop_tokens), dtype=tokens.dtype).to(tokens))
    before = stop.cumsum(1) - stop.long()  # stop tokens strictly before t
    mask = before == 0
    return mask, mask.sum(1), ~stop.any(1)


def loss_mask(generated: Bool[Tensor, "B T"], own: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Tokens inside the completion that the policy drew itself (not a tool's, not a user's)."""
    return generated & own


def foreign(rollout: Rollout) -> Bool[Tensor, "B T"]:
    """An environment's tokens: not trained, and without a log-probability of the engine (NaN).

    Rows that would be all foreign are of an engine that gives no log-probabilities: none is then.
    """
    found = rollout.engine_logp.isnan().to(rollout.mask.device) & ~rollout.mask
    whole = found.sum(1, keepdim=True) >= rollout.length.to(found.device)[:, None]
    return found & ~whole


@runtime_checkable
class Truncation(Protocol):
    """What becomes of truncated rows before credit is assigned."""

    def __call__(self, rollout: Rollout) -> Rollout:
        """The rollout with the rewards or the mask of truncated rows changed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepTruncated:
    """Truncated rows keep their reward as graded (mostly 0: no answer) and are trained."""

    kind: Literal["none"] = "none"

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(self, rollout: Rollout) -> Rollout:
        """The rollout as it is."""
        return rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskAfter:
    """Truncated rows shape the group's statistics, but their tokens are not trained.

    Source: DAPO's overlong filtering, arXiv 2503.14476, §3.4; TRL's
    ``mask_truncated_completions``.
    """

    kind: Literal["mask_after"] = "mask_after"

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(self, rollout: Rollout) -> Rollout:
        """The rollout with an empty mask on truncated rows."""
        kept = ~rollout.truncated.to(rollout.mask.device)
        return replace(rollout, mask=rollout.mask & kept[:, None])


@dataclass(frozen=True, slots=True, kw_only=True)
class ExcludeBefore:
    """Truncated rows count as unscored: out of the group's statistics and not trained.

    It biases the baseline upwards, and lengths can run away (Skywork-OR1, arXiv 2505.22312, calls
    it "Adv-Mask-Before" and advises against it).
    """

    kind: Literal["exclude_before"] = "exclude_before"

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(self, rollout: Rollout) -> Rollout:
        """The rollout with NaN rewards on truncated rows."""
        return replace(rollout, total=rollout.total.where(~rollout.truncated, torch.nan))


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroReward:
    """Truncated rows score 0, even where an answer was found. Source: Dr. GRPO's code (oat).

    It changes the total, so a recipe whose credit does not read that (``Gdpo``) is refused.
    """

    kind: Literal["zero_reward"] = "zero_reward"

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __call__(self, rollout: Rollout) -> Rollout:
        """The rollout with reward 0 on truncated rows; unscored ones stay unscored."""
        hit = rollout.truncated & torch.isfinite(rollout.total)
        return replace(rollout, total=rollout.total.where(~hit, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalty:
    """Truncated rows score ``value`` if it is negative, else their reward times ``value``.

    It changes the total, so a recipe whose credit does not read that (``Gdpo``) is refused.
    Source: OpenRLHF's ``stop_properly_penalty_coef``.
    """

    kind: Literal["penalty"] = "penalty"
    value: float = -0.5

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not abs(self.value) < float("inf"):
            raise ValueError(f"penalty value = {self.value} must be finite, such as -0.5")

    def __call__(self, rollout: Rollout) -> Rollout:
        """The rollout with penalised rewards on truncated rows; unscored ones stay unscored."""
        total = rollout.total
        changed = torch.full_like(total, self.value) if self.value < 0.0 else total * self.value
        hit = rollout.truncated & torch.isfinite(total)
        return replace(rollout, total=torch.where(hit, changed, total))
