"""The ``[data]`` section: what to train on, what to hold out, and how prompts are encoded.

A source is one flat table: ``kind``, the source's own keys, and ``weight`` in the mixture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from gruppo.data import sources
from gruppo.data.stream import Curriculum
from gruppo.recipe.fields import kind_of
from gruppo.recipe.widen import Wide, one_of

SOURCES: Final = (
    sources.Jsonl,
    sources.Parquet,
    sources.Verl,
    sources.Hub,
    sources.Gym,
    sources.Verifiers,
    sources.TaskSource,
)
"""Kinds of sources that a recipe may name."""

_WIDE: Final = {
    kind_of(record): Wide(record=record, own={"weight": (float, 1.0)}) for record in SOURCES
}
if TYPE_CHECKING:
    AnySource = Any  # the types below exist at run time only
else:
    AnySource = one_of(wide.type for wide in _WIDE.values())


def make_source(table: Any) -> sources.DataSource:
    """The source that a flat record means."""
    return _WIDE[table.kind].make(table)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """The problems.

    ``train`` is a mixture: each draw takes a source with probability proportional to its
    ``weight``. ``held_out`` problems are taken out of them for evaluation, in the same proportions
    (equal prompts stay together); ``test`` are further sources for evaluation only. Prompts of more
    than ``max_prompt_tokens`` are left out, counted and told (``too_long = "drop"``), or refused
    ("error"). Unless set, it is 1024, or what ``max_tokens`` of rollout and evaluation leave of the
    model's context if that is less; a number for which the context has no room is refused.
    ``curriculum`` lets earlier pass rates steer the draw; ``seed`` draws the split.
    ``chat = false`` sends prompts as plain text to models without a chat template;
    ``template_options`` go to the template (``enable_thinking``, say).
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    train: tuple[AnySource, ...]
    test: tuple[AnySource, ...] = ()
    held_out: int = 0
    max_prompt_tokens: int | None = None
    too_long: Literal["drop", "error"] = "drop"
    chat: bool = True
    template_options: Mapping[str, Any] = field(default_factory=dict)
    curriculum: Curriculum = field(default_factory=Curriculum)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train: must name at least one source")
        for source in (*self.train, *self.test):
            if source.weight <= 0:
                raise ValueError(f"weight = {source.weight}: must be above 0")
        if self.held_out < 0:
            raise ValueError(f"held_out = {self.held_out}: must be 0 or more problems")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens = {self.max_prompt_tokens}: must be at least 1")
