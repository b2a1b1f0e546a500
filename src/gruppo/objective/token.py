"""Token-level advantage formulas: returns, GAE, whitening, optimal token baseline, VAPO's λ, RAE.

Pure functions over tensors. Masked positions (tool tokens, padding) are transparent: values carry
across the hole, and results there are 0. Nothing here knows rollouts, models or configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gruppo.objective.credit_base import (
    check_ddof,
    group_count,
    live_rows,
    num_groups,
)
from gruppo.types import ZERO_TOL

LOG_RATIO_LIMIT = 20.0  # exp(±20) is where a float32 ratio still is finite when squared
SCORE_LIMIT = 10.0  # OpenRLHF and the REINFORCE++ paper clip the terminal reward to ±10


def token_rewards(
    total: Float[Tensor, "B"],
    k1: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> Float[Tensor, "B T"]:
    """r_t = −β·k1_t, plus the row's reward, clipped to ±10, on its last trained token.

    Args:
        total: Row rewards, finite where the row has trained tokens.
        k1: log π_old − log π_ref per token; clamped to ±20.
        mask: Trained tokens.
        beta: KL coefficient.

    Source: REINFORCE++, arXiv 2501.03262; InstructGPT's KL-in-reward, arXiv 2203.02155.
    """
    limited = k1.where(mask, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    position = torch.arange(mask.shape[1], device=mask.device)
    last = position.where(mask, -1).amax(1, keepdim=True) if mask.shape[1] else position[None]
    terminal = total.clamp(-SCORE_LIMIT, SCORE_LIMIT)[:, None]
    return (-beta * limited + terminal.where(position == last, 0.0)).where(mask, 0.0)


def returns_to_go(
    rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: float = 1.0
) -> Float[Tensor, "B T"]:
    """Discounted sum of this and all later trained tokens' rewards; a hole does not discount.

    >>> mask = torch.tensor([[True, False, True]])
    >>> returns_to_go(torch.tensor([[1.0, 9.0, 2.0]]), mask, gamma=0.5)
    tensor([[2., 0., 2.]])
    """
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return advantages


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalised advantage estimation over the trained tokens of each row.

    δ_t = r_t + γ V_next − V_t and A_t = δ_t + γλ A_next, where "next" is the next *trained* token;
    after the last one V_next = A_next = 0, also for truncated rows.

    Returns:
        Advantages and returns A + V (before any whitening); both 0 where the mask is False.

    Source: arXiv 1506.02438, eq. 16.
    """
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = advantage.where(mask[:, t], 0.0)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return advantages, advantages + values


def whiten(
    values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, ddof: int = 0, shift: bool = True
) -> Float[Tensor, "B T"]:
    """Zero mean and unit variance over all trained tokens of the batch: (x − mean)/√max(var, 1e-8).

    ``ddof = 0`` is the population variance (OpenRLHF, AReaL, NeMo-RL), 1 is Bessel's (verl).
    ``shift = False`` scales only and keeps the mean. Equal values give exactly 0 (or the mean).

    >>> whiten(torch.tensor([[1.0, 3.0, 7.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.,  1.,  0.]])
    """
    check_ddof(ddof)
    trained = values[mask]
    if trained.numel() == 0:
        return torch.zeros_like(values)
    mean = trained.mean()
    deviation = trained - mean
    variance = deviation.square().sum() / max(trained.numel() - ddof, 1)
    scaled = (values - mean) / variance.clamp(min=1e-8).sqrt()
    if not bool(trained.max() - trained.min() > ZERO_TOL):
        scaled = torch.zeros_like(values)
    return (scaled if shift else scaled + mean).where(mask, 0.0)


def optimal_token_baseline(
    total: Float[Tensor, "B"],
    old_logp: Float[Tensor, "B T"],
    *,
    sum_pi2: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    group: Int[Tensor, "B"],
    eps: float = 1e-8,
    zero_tail: bool = True,
) -> Float[Tensor, "B T"]:
    """Advantages under the variance-optimal baseline of each position: A_it = R_i − b_t.

    b_t = Σ_i R_i W_it / Σ_i W_it over the rows of the group that have a trained token at t, with
    W_it = Σ_{u≤t} (1 − 2π_iu + Σ_v π_v²), a proxy of the accumulated squared score norm.

    Args:
        total: Outcome rewards (NaN: unscored).
        old_logp: Log-probability of the sampled token.
        sum_pi2: Σ_v π_v² of the same distribution.
        mask: Trained tokens.
        group: Group ids.
        eps: Added to ΣW.
        zero_tail: Where one row is longer than all others (in trained tokens), its baseline is 0
            after the last trained token of the others, because there it would equal R itself.

    Source: Li et al., "optimal token baseline", ICML 2026; checked against verl's estimator.
    """
    total = total.double()
    live = live_rows(total, group)
    trained = mask & live[:, None]
    score = 1.0 - 2.0 * old_logp.double().where(trained, 0.0).exp() + sum_pi2.double()
    weight = score.where(trained, 0.0).cumsum(1).where(trained, 0.0)
    zeros = weight.new_zeros(num_groups(group), mask.shape[1])
    reward = total.where(live, 0.0)[:, None]
    above = zeros.index_add(0, group, weight * reward)
    below = zeros.index_add(0, group, weight)
    baseline = (above / (below + eps))[group]
    if zero_tail:
        baseline = baseline.where(~_lone_tail(trained, group), 0.0)
    return (reward - baseline).where(trained, 0.0)


def _lone_tail(trained: Bool[Tensor, "B T"], group: Int[Tensor, "B"]) -> Bool[Tensor, "B T"]:
    """Positions of a group's one longest row that come after the last tokens of its siblings."""
    count = trained.sum(1)
    longest = count.new_zeros(num_groups(group)).scatter_reduce(0, group, count, "amax")
    is_longest = count == longest[group]
    alone = is_longest & (group_count(is_longest, group) == 1)[group]
    position = torch.arange(trained.shape[1], device=trained.device)
    others = trained & ~alone[:, None]
    end = ((position + 1) * others).amax(1) if trained.shape[1] else torch.zeros_like(count)
    others_end = end.new_zeros(num_groups(group)).scatter_reduce(0, group, end, "amax")
    return alone[:, None] & (position >= others_end[group][:, None])


def vapo_lambda(length: Int[Tensor, "B"], *, alpha: float = 0.05) -> Float[Tensor, "B"]:
    """Length-adaptive λ of the policy: 1 − 1/(α·length), not below 0. Source: arXiv 2504.05118.

    >>> vapo_lambda(torch.tensor([10, 100, 1000]))
    tensor([0.0000, 0.8000, 0.9800], dtype=torch.float64)
    """
    return (1.0 - 1.0 / (alpha * length.double())).clamp(min=0.0)


def rae(
    rewards: Sequence[float],
    roles: Sequence[str],
    state: Mapping[str, float],
    *,
    decay: float = 0.95,
) -> tuple[Float[Tensor, "N"], dict[str, float]]:
    """Role-conditioned advantage: reward minus a running mean kept per role.

    A = R − b, *then* b ← decay·b + (1 − decay)·R, with b = 0 at first: subtracting before updating
    keeps the baseline independent of the reward. A NaN reward gives 0 and moves nothing.

    Args:
        rewards: In the order in which they happened.
        roles: The (game, role) of each reward, as a text key.
        state: Running mean per role; not modified.
        decay: Weight of the past.

    Returns:
        Advantages and the new state.

    Source: SPIRAL, arXiv 2506.24119 (in prime-rl's order).

    Example:
        >>> rae([1.0, 1.0], ["chess/white", "chess/white"], {}, decay=0.5)
        (tensor([1.0000, 0.5000], dtype=torch.float64), {'chess/white': 0.75})
    """
    after, advantages = dict(state), []
    for reward, role in zip(rewards, roles, strict=True):
        baseline = after.get(role, 0.0)
        if math.isnan(reward):
            advantages.append(0.0)
            continue
        advantages.append(reward - baseline)
        after[role] = decay * baseline + (1.0 - decay) * reward
    return torch.tensor(advantages, dtype=torch.float64), after
