"""The ``[reward]`` section: named parts, of which one is the task metric.

A part is one flat table: ``name``, ``kind``, the reward's own keys, and ``weight``, ``minimum``
and ``shape`` as in ``gruppo.reward.Part``. A reward function of one's own is
``kind = "function", function = "package.module:NAME"``, or for short ``kind`` itself names it.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from gruppo.recipe.widen import Wide, one_of
from gruppo.reward import KINDS, SHAPE_KINDS, Function, Part, RewardSet

_UNBOUNDED: Final = 1 << 40  # stands for the rollout's max_tokens until that is known


def _wide(kind: str) -> Wide:
    return Wide(
        record=KINDS[kind],
        own={
            "name": (str, MISSING),
            "weight": (float, 1.0),
            "minimum": (float, 0.0),
            "shape": (bool, kind in SHAPE_KINDS),
        },
        renamed={"name": "function"} if KINDS[kind] is Function else {},
        optional=("max_tokens",),  # of a length term: the rollout's, unless another is given
    )


_WIDE: Final = {kind: _wide(kind) for kind in KINDS}
if TYPE_CHECKING:
    AnyPart = Any  # the types below exist at run time only
else:
    AnyPart = one_of(wide.type for wide in _WIDE.values())


def make_part(table: Any, *, max_tokens: int) -> Part:
    """The reward part that a flat record means; ``max_tokens`` is the budget if it gives none."""
    wide = _WIDE[table.kind]
    return Part(reward=wide.make(table, max_tokens=max_tokens), **wide.extra(table))


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSection:
    """What a completion is worth: the sum of the ``parts``, of which one is the ``task`` metric.

    ``task``, ``clip_range`` and ``shape_only_live`` as in ``gruppo.reward.RewardSet``. Before
    training, the data's own answers are scored as the completion ``answer_template`` (``{answer}``
    is replaced), and the run is refused if none gets the full task reward ``answer_score``;
    "none" leaves that out, for tasks with many right answers.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    parts: tuple[AnyPart, ...]
    task: str | tuple[str, ...] | None = None
    clip_range: tuple[float, float] | None = None
    shape_only_live: bool = True
    answer_template: str | None = None
    answer_score: float = 1.0

    def __post_init__(self) -> None:
        self.build(max_tokens=_UNBOUNDED)
        if self.answer_template is not None and "{answer}" not in self.answer_template:
            raise ValueError(f"answer_template = {self.answer_template!r}: must hold {{answer}}")

    def build(self, *, max_tokens: int) -> RewardSet:
        """Make the reward set. Raises ValueError for parts that make no sense together."""
        return RewardSet(
            tuple(make_part(part, max_tokens=max_tokens) for part in self.parts),
            task=self.task,
            clip_range=self.clip_range,
            shape_only_live=self.shape_only_live,
        )
