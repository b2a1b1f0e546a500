"""Which groups and prompts are worth training on: pure rules, and the loop that samples others.

``refill`` is that loop; rollouts are collected by it. The other rules are published ones that no
part of the training loop applies: what it goes by is ``gruppo.types.is_live`` (DAPO's dynamic
sampling, arXiv 2503.14476, eq. 11). What to do with groups that fail is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


def mean_inside(metric: Sequence[float | None], *, low: float = 0.0, high: float = 1.0) -> bool:
    """Whether a group's mean task metric lies strictly between ``low`` and ``high``.

    With (0, 1) and binary rewards that is ``gruppo.types.is_live``, which is the rule of the
    training loop; a narrower interval also drops groups that are nearly solved or nearly hopeless.
    Published for comparison (OpenRLHF's dynamic filtering), not used by the loop.

    >>> mean_inside([1.0, None, 0.0]), mean_inside([1.0, 1.0])
    (True, False)
    """
    if not low < high:
        raise ValueError(f"low = {low} must be below high = {high}")
    scored = [value for value in metric if value is not None]
    return bool(scored) and low < sum(scored) / len(scored) < high


@dataclass(frozen=True, slots=True, kw_only=True)
class Refill(Generic[Item]):
    """What ``refill`` collected: ``used`` for this step, ``surplus`` to carry into the next.

    ``generated`` counts the items drawn and ``batches`` the calls of ``draw``; ``rejected`` holds
    the items that were not kept. ``len(used) < target`` means that the limit of batches was hit.
    """

    used: tuple[Item, ...]
    surplus: tuple[Item, ...]
    rejected: tuple[Item, ...]
    generated: int
    batches: int


def refill(
    draw: Callable[[int], Sequence[Item]],
    keep: Callable[[Item], bool],
    *,
    target: int,
    max_batches: int = 10,
    carry: Sequence[Item] = (),
) -> Refill[Item]:
    """Draw until ``target`` items pass ``keep``, in the order in which they were drawn.

    Order of drawing, not of completion: accepting whatever finishes first would favour short
    completions. Surplus items are handed back (DAPO's recipe throws them away).

    Args:
        draw: Makes a batch; it is told how many items are missing and may return more or fewer.
        keep: The rule.
        target: Items wanted.
        max_batches: Calls of ``draw`` at most.
        carry: Items accepted earlier, used first.

    Example:
        >>> numbers = iter([[1, 2], [3, 4, 6]])
        >>> refill(lambda missing: next(numbers), lambda n: n % 2 == 0, target=2).used
        (2, 4)
    """
    if target < 1 or max_batches < 0:
        raise ValueError(f"target = {target} must be ≥ 1 and max_batches = {max_batches} ≥ 0")
    accepted, rejected = list(carry), []
    generated = batches = 0
    while len(accepted) < target and batches < max_batches:
        items = draw(target - len(accepted))
        batches += 1
        generated += len(items)
        for item in items:
            (accepted if keep(item) else rejected).append(item)
    return Refill(
        used=tuple(accepted[:target]),
        surplus=tuple(accepted[target:]),
        rejected=tuple(rejected),
        generated=generated,
        batches=batches,
    )


def solved_prompts(
    history: Mapping[str, tuple[int, int]], *, threshold: float = 0.9
) -> tuple[str, ...]:
    """Prompts to remove for good: historical pass rate at or above ``threshold``.

    The training loop removes none by itself: this is for preparing data.

    Args:
        history: Prompt id → (completions scored so far, right ones).
        threshold: Pass rate from which a prompt has nothing left to teach.

    Source: ScaleRL's no-positive-resampling, arXiv 2510.13786.

    Example:
        >>> solved_prompts({"a": (16, 15), "b": (16, 14)})
        ('a',)
    """
    return tuple(
        name for name, (tried, right) in history.items() if tried and right / tried >= threshold
    )


def offline_pass_rate(
    rates: Mapping[str, float], *, low: float = 0.125, high: float = 0.5
) -> tuple[str, ...]:
    """Prompts to keep before training: low < pass rate of the start model ≤ high.

    For preparing data; the training loop does not call it.

    The defaults keep prompts with 2 to 4 right answers of 8. Source: INTELLECT-2, arXiv
    2505.07291.
    """
    return tuple(name for name, rate in rates.items() if low < rate <= high)
