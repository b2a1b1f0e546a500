"""The largest micro-batches of a run like what was drawn: what its activations are counted for.

Rows that an update leaves out one by one (unscored ones, say) are counted as if they were trained.
"""

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

# Optimizer steps that are put together from the groups that were drawn: more would tell little of
# the rarest ones, as the groups are a few dozen.
_DRAWS: Final = 400


def largest_micro_batches(
    groups: Sequence[Group],
    *,
    size: int,
    budget: int,
    steps: int,
    packed: bool,
    skips: bool,
    resamples: bool,
) -> list[Pass]:
    """What a run's largest micro-batches would be if its groups were like these.

    The largest of steps that have no other, and that of steps that have; about one in as many steps
    as the run has is larger. Where no group would be trained, the largest counts as trained: one
    will come.

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
    if not live.any():
        live[np.argmax([_size(group) for group in groups])] = True
    draw, found = np.random.default_rng(0), []
    pool = np.flatnonzero(live) if resamples else np.arange(len(groups))
    for _ in range(_DRAWS):
        chosen = draw.choice(pool, size)
        used = chosen[live[chosen]] if skips else chosen
        shapes = _shapes([groups[at] for at in used], budget, packed) or [_shortest(groups)]
        found.append(Pass(max(shapes, key=_tokens), alone=len(shapes) == 1))
    kinds = ([each for each in found if each.alone is alone] for alone in (True, False))
    return [_quantile(kind, steps / (steps + 1)) for kind in kinds if kind]


def _quantile(passes: list[Pass], share: float) -> Pass:
    passes.sort(key=lambda each: _tokens(each.shape))
    return passes[min(len(passes) - 1, math.ceil(len(passes) * share))]


def _size(group: Group) -> int:
    return len(group.prompt_tokens) + sum(len(c.tokens) for c in group.completions)


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
    """One row of these; what is not packed is padded to the longest, and counted as completion."""
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
    rows = [
        (len(c.tokens), len(group.prompt_tokens)) for group in groups for c in group.completions
    ]
    length, prompt = min((row for row in rows if row[0]), default=(1, 1))
    return Shape(prompts=[prompt], completions=[[length]])
