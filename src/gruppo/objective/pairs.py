"""Losses on preference pairs: DPO and IPO, elementwise and without a reduction.

Inputs are log-probabilities of whole completions, summed over their tokens. How pairs are made
(offline data, best and worst of a group) is not decided here.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def implicit_reward(
    logp: Float[Tensor, "N"], ref_logp: Float[Tensor, "N"], *, beta: float
) -> Float[Tensor, "N"]:
    """β (log π − log π_ref): the reward under which π would be optimal. arXiv 2305.18290, eq. 5."""
    if not beta > 0.0:
        raise ValueError(f"beta = {beta} must be positive, such as 0.1")
    return beta * (logp - ref_logp)


def dpo_loss(chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """−log σ(chosen − rejected) of implicit rewards. Source: DPO, arXiv 2305.18290, eq. 7.

    >>> import torch
    >>> dpo_loss(torch.tensor([0.10]), torch.tensor([-0.05]))
    tensor([0.6210])
    """
    return -functional.logsigmoid(chosen - rejected)


def ipo_loss(
    chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], *, beta: float
) -> Float[Tensor, "N"]:
    """((chosen − rejected)/β − 1/(2β))²: a bounded target for the margin.

    Source: IPO, arXiv 2310.12036, eq. 17 (with its τ = β).
    """
    if not beta > 0.0:
        raise ValueError(f"beta = {beta} must be positive, such as 0.1")
    return ((chosen - rejected) / beta - 1.0 / (2.0 * beta)).square()
