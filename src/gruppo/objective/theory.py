"""Closed forms that explain what a run does: dead groups, difficulty weights, scaling laws.

Used by explanations, planning and tests; nothing in a training step depends on them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def dead_probability(pass_rate: float, group_size: int) -> float:
    """Probability that all completions of a prompt agree: p^G + (1 − p)^G.

    >>> round(dead_probability(0.9, 8), 6)
    0.430467
    """
    return pass_rate**group_size + (1.0 - pass_rate) ** group_size


def inverse_std(pass_rate: float) -> float:
    """1/√(p(1 − p)): how much the group's σ amplifies a prompt with binary rewards."""
    return 1.0 / math.sqrt(pass_rate * (1.0 - pass_rate))


def gradient_scale(pass_rate: float, *, std_power: int) -> float:
    """Expected size of a prompt's gradient, E[(R − p)²]/σ^k, in the limit of large groups.

    ``std_power`` k = 1 is GRPO, √(p(1−p)); k = 0 is Dr. GRPO, p(1−p). Source: arXiv 2503.20783.
    """
    variance = pass_rate * (1.0 - pass_rate)
    return variance / math.sqrt(variance) ** std_power


def scaling_sigmoid(
    compute: float, *, start: float, ceiling: float, midpoint: float, exponent: float
) -> float:
    """Pass rate after some compute: R₀ + (A − R₀)/(1 + (C_mid/C)^b).

    Args:
        compute: C, in GPU-hours or any unit that ``midpoint`` shares.
        start: R₀, before training.
        ceiling: A, the asymptote.
        midpoint: C_mid, where half the gain is reached.
        exponent: b, the efficiency.

    Source: ScaleRL, arXiv 2510.13786, eq. 1.
    """
    return start + (ceiling - start) / (1.0 + (midpoint / compute) ** exponent)


def entropy_reward_law(entropy: float, *, a: float, b: float) -> float:
    """Reward that a policy of this entropy reaches: −a·e^H + b; its ceiling, at H = 0, is b − a.

    Source: "The Entropy Mechanism of RL for Reasoning Language Models", arXiv 2505.22617.
    """
    return -a * math.exp(entropy) + b


def policy_gradient(
    probabilities: Float[Tensor, "V"], rewards: Float[Tensor, "V"]
) -> Float[Tensor, "V"]:
    """Exact gradient of the expected reward of one softmax choice by its logits: π (r − π·r)."""
    return probabilities * (rewards - probabilities @ rewards)


def expected_group_gradient(
    probabilities: Float[Tensor, "V"],
    rewards: Float[Tensor, "V"],
    *,
    group_size: int,
    advantage: Callable[[Float[Tensor, "N G"]], Float[Tensor, "N G"]],
) -> Float[Tensor, "V"]:
    """Expected gradient that a group estimator gives, by enumeration of all V^G groups.

    It shows that a baseline which contains the own sample shrinks the gradient by (G − 1)/G, and
    that the leave-one-out baseline is unbiased.

    Args:
        probabilities: π over V answers.
        rewards: Reward of every answer.
        group_size: G; V^G groups are enumerated.
        advantage: Advantages [N, G] from the rewards [N, G] of N groups.

    Returns:
        E[(1/G) Σ_i A_i ∇ log π(answer_i)], by the logits.
    """
    num_answers = probabilities.shape[0]
    groups = torch.tensor(list(itertools.product(range(num_answers), repeat=group_size)))
    chance = probabilities[groups].prod(1)  # [N]
    score = torch.eye(num_answers).to(probabilities)[groups] - probabilities  # [N, G, V]
    credit = advantage(rewards[groups])
    return torch.einsum("n,ng,ngv->v", chance, credit, score) / group_size
