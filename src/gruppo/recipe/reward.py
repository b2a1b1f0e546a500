"""The ``[reward]`` section: named parts, of which one is the task metric.

A part is one flat table: ``name``, ``kind``, the reward's own keys, and ``weight``, ``minimum``,
``shape``, ``clip``, ``gate`` and ``ramp`` as in ``gruppo.reward.Part``. A reward function of your
own is ``kind = "function", function = "package.module:NAME"``; for short, ``kind`` itself names it.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from gruppo.recipe.widen import Wide, one_of
from gruppo.reward import KINDS, SHAPE_KINDS, Gate, Part, Ramp, RewardSet

AUTO: Final = "auto"
OFF: Final = "none"
_RENAMED: Final = {"function": "function", "reward_model": "model"}  # beside the part's own name
_UNBOUNDED: Final = 1 << 40  # stands for the rollout's max_tokens until that is known


def _wide(kind: str) -> Wide:
    return Wide(
        record=KINDS[kind],
        own={
            "name": (str, MISSING),
            "weight": (float, 1.0),
            "minimum": (float, 0.0),
            "shape": (bool, kind in SHAPE_KINDS),
            "clip": (tuple[float, float] | None, None),
            "gate": (Gate | None, None),
            "ramp": (Ramp | None, None),
        },
        renamed={"name": _RENAMED[kind]} if kind in _RENAMED else {},
        optional=("max_tokens",),  # of a length term: the rollout's, unless another is given
    )


_WIDE: Final = {kind: _wide(kind) for kind in KINDS}
if TYPE_CHECKING:
    AnyPart = Any  # the types below exist at run time only
else:
    AnyPart = one_of(wide.type for wide in _WIDE.values())


def make_part(table: Any, *, max_tokens: int, device: str | None = None) -> Part:
    """The part that a flat record means, with this budget and device where it gives none."""
    wide = _WIDE[table.kind]
    reward = wide.make(table, max_tokens=max_tokens, device=device)
    return Part(reward=reward, **wide.extra(table))


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSection:
    """What a completion is worth: the sum of the ``parts``, of which one is the ``task`` metric.

    ``task``, ``clip_range`` and ``shape_only_live`` as in ``gruppo.reward.RewardSet``. Before
    training, a sample of each source's own answers is scored as the completion ``answer_template``
    (``{answer}`` is replaced) and must get the full task reward ``answer_score``; a source where
    more than a tenth do not is refused. "auto" writes the answer where the task reward reads it,
    and tries nothing if a task part does not say where (a function of your own, a regex) or two
    read it in different places; "none" leaves the check out, for data whose answers are no
    completions.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    parts: tuple[AnyPart, ...]
    task: str | tuple[str, ...] | None = None
    clip_range: tuple[float, float] | None = None
    shape_only_live: bool = True
    answer_template: str = AUTO
    answer_score: float = 1.0

    def __post_init__(self) -> None:
        self.build(max_tokens=_UNBOUNDED)
        if self.answer_template not in (AUTO, OFF) and "{answer}" not in self.answer_template:
            raise ValueError(
                f"answer_template = {self.answer_template!r}: must hold {{answer}}, or be "
                f'"{AUTO}" or "{OFF}"'
            )

    def own_answer(self) -> str | None:
        """The completion that the data's own answers are tried as; None if they are not tried."""
        if self.answer_template == OFF:
            return None
        if self.answer_template == AUTO:
            places = set(self.answer_places().values())
            return places.pop() if len(places) == 1 else None
        return self.answer_template

    def answer_places(self) -> dict[str, str | None]:
        """Where each task part reads an answer, as ``gruppo.reward.RewardSet`` tells it."""
        return self.build(max_tokens=_UNBOUNDED).answer_templates()

    def build(self, *, max_tokens: int, device: str | None = None) -> RewardSet:
        """Make the reward set. Raises ValueError for parts that make no sense together."""
        return RewardSet(
            tuple(make_part(part, max_tokens=max_tokens, device=device) for part in self.parts),
            task=self.task,
            clip_range=self.clip_range,
            shape_only_live=self.shape_only_live,
        )
