"""Batch arithmetic: rows, optimizer steps and accumulation, with the divisions checked.

Peers count differently (verl's mini-batch is in prompts; TRL's, OpenRLHF's and slime's in
completions); here a *row* is a completion. For translating a peer's settings: the training loop
does not call it, since its mini-batches are whole groups and its micro-batches counted in tokens.
"""

from __future__ import annotations


def _divide(whole: int, part: int, *, what: str) -> int:
    """whole/part, or a ValueError that says which neighbours would divide."""
    if part < 1 or whole < 1:
        raise ValueError(f"{what}: {whole} / {part} must be of positive numbers")
    if whole % part:
        fits = sorted(n for n in range(1, whole + 1) if whole % n == 0)
        below = max(n for n in fits if n <= part)
        above = min((n for n in fits if n >= part), default=whole)
        raise ValueError(f"{what}: {whole} is not divisible by {part}; use {below} or {above}")
    return whole // part


def rows_per_rollout(prompts: int, group_size: int) -> int:
    """Completions sampled per rollout: P·G.

    >>> rows_per_rollout(512, 16)
    8192
    """
    if prompts < 1 or group_size < 1:
        raise ValueError(f"prompts = {prompts} and group_size = {group_size} must be at least 1")
    return prompts * group_size


def optimizer_steps(
    prompts: int, group_size: int, *, minibatch_rows: int, inner_epochs: int = 1
) -> int:
    """Optimizer steps per rollout: inner_epochs·P·G/minibatch_rows.

    Raises:
        ValueError: If mini-batches would not be equal, or would cut a group.

    Example:
        >>> optimizer_steps(512, 16, minibatch_rows=512)
        16
    """
    rows = rows_per_rollout(prompts, group_size)
    _divide(minibatch_rows, group_size, what="minibatch_rows / group_size (whole groups)")
    return inner_epochs * _divide(rows, minibatch_rows, what="rows / minibatch_rows")


def accumulation_steps(minibatch_rows: int, *, ranks: int, micro_rows: int) -> int:
    """Micro-batches per optimizer step on each rank: minibatch_rows/(ranks·micro_rows).

    >>> accumulation_steps(512, ranks=8, micro_rows=4)
    16
    """
    per_rank = _divide(minibatch_rows, ranks, what="minibatch_rows / ranks")
    return _divide(per_rank, micro_rows, what="rows per rank / micro_rows")
