"""The largest micro-batch that a run is expected to see: what its activations are counted for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Final

import numpy as np

from gruppo.memory import Extent, portions
from gruppo.model.footprint import Shape
from gruppo.plan import Pass
from gruppo.types import Group

_DRAWS: Final = 400  # optimizer steps that are put together from the groups that were drawn


def largest_micro_batch(
    groups: Sequence[Group],
    *,
    size: int,
    budget: int,
    steps: int,
    packed: bool,
    skips: bool,
    resamples: bool,
) -> Pass:
    """What a run's largest micro-batch would be if its groups were like these.

    Optimizer steps are put together at random; one in as many as the run has is larger than this.

    Args:
        groups: what was drawn.
        size: groups of an optimizer step.
        budget: tokens of a forward pass.
        steps: optimizer steps of the run.
        packed: whether a prompt goes forward once a group.
        skips: whether groups without a signal are left out of training; a step of no others
            passes its shortest completion.
        resamples: whether others are drawn in their place.
    """
    live = np.array([group.is_live("total") for group in groups])
    draw, found = np.random.default_rng(0), []
    pool = np.flatnonzero(live) if resamples and live.any() else np.arange(len(groups))
    for _ in range(_DRAWS):
        chosen = draw.choice(pool, size)
        used = chosen[live[chosen]] if skips else chosen
        shapes = _shapes([groups[at] for at in used], budget, packed) or [_shortest(groups)]
        found.append(Pass(max(shapes, key=_tokens), alone=len(shapes) == 1))
    # beside others there are more gradients, which is more than any tokens
    found.sort(key=lambda each: (not each.alone, _tokens(each.shape)))
    return found[min(_DRAWS - 1, math.ceil(_DRAWS * steps / (steps + 1)))]


def _shapes(groups: Sequence[Group], budget: int, packed: bool) -> list[Shape]:
    rows = [
        Extent(group=at, prompt=len(group.prompt_tokens), completion=len(completion.tokens))
        for at, group in enumerate(groups)
        for completion in group.completions
    ]
    parts = portions(rows, budget, packed=packed)
    return [_shape([rows[at] for at in part], packed) for part in parts]


def _tokens(shape: Shape) -> int:
    return sum(shape.prompts) + shape.positions


def _shape(rows: Sequence[Extent], packed: bool) -> Shape:
    """One row of these; what is not packed is as long as the longest, prompt and all."""
    if not packed:
        longest = max(row.prompt + row.completion for row in rows)
        return Shape(
            prompts=[row.prompt for row in rows],
            completions=[[longest - row.prompt] for row in rows],
        )
    together = [list(part) for _, part in groupby(rows, key=lambda row: row.group)]
    return Shape(
        prompts=[part[0].prompt for part in together],
        completions=[[row.completion for row in part] for part in together],
    )


def _shortest(groups: Sequence[Group]) -> Shape:
    group = min(groups, key=lambda group: min(len(c.tokens) for c in group.completions))
    length = min(len(completion.tokens) for completion in group.completions)
    return Shape(prompts=[len(group.prompt_tokens)], completions=[[max(length, 1)]])
