"""Presets under a recipe: what the recipe's tables look like once its preset is put below them.

Only tables are handled here; whether the outcome is sound is validated afterwards, as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gruppo.objective import PLANNED, PRESETS
from gruppo.recipe.check import check_section
from gruppo.recipe.credit_rules import takes_shaping
from gruppo.recipe.mistakes import Mistake, did_you_mean, mistake
from gruppo.recipe.objective import ObjectiveSection
from gruppo.recipe.tables import merge, to_table
from gruppo.rollout import RolloutSettings

DEFAULT: Final = "default"
_OVERLONG: Final = "soft_overlong"
_BUFFER_SHARE: Final = 5  # DAPO's buffer is 4,096 of 20,480 tokens (arXiv 2503.14476, section 4)


def lay_under(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Mistake]]:
    """The recipe's tables on top of its preset's, and what is wrong with the preset's name."""
    objective = data.get("objective", {})
    if not isinstance(objective, dict):
        return dict(data), []
    name, mistakes = objective.get("preset", DEFAULT), []
    if name not in PRESETS:
        mistakes.append(_unknown(name))
        name = DEFAULT
    preset = PRESETS[name]
    table = merge(to_table(preset.objective), {**objective, "preset": name})
    settings = _fitting(preset.rollout, table)
    result = merge(_sections(settings), {**data, "objective": table})
    buffer = settings.get("overlong_buffer")
    if isinstance(buffer, int):
        result = _with_overlong(result, buffer)
    return result, mistakes


def _fitting(settings: Mapping[str, object], table: dict[str, Any]) -> dict[str, Any]:
    """A preset's settings, less those that the recipe's changes to its objective made senseless.

    They give way, since the user would be blamed for a value that the preset has set: a reference
    that nobody reads need not be moved, a term that the credit cannot take is not added, and a
    group is not smaller than the credit needs.
    """
    section = check_section("objective", ObjectiveSection, table).value if settings else None
    if section is None:  # nothing to choose from, or an objective that is refused anyway
        return dict(settings)
    objective = section.build(max_tokens=1)
    size = settings.get("group_size")
    fits = {
        "reference_sync_steps": objective.needs_reference,
        "overlong_buffer": takes_shaping(objective.credit),
        "group_size": isinstance(size, int) and size >= objective.credit.min_group,
    }
    return {key: value for key, value in settings.items() if fits.get(key, True)}


def _unknown(name: object) -> Mistake:
    if name in PLANNED:
        return mistake("objective.preset", f"is planned; it still needs {PLANNED[name]}", name)
    return mistake("objective.preset", did_you_mean(name, sorted(PRESETS), "preset"), name)


def _sections(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A preset's settings as defaults of the sections that hold them.

    ``greedy_baseline`` has no key: whoever builds the run reads it off the objective.
    """
    rollout = {key: settings[key] for key in ("group_size", "filter") if key in settings}
    if settings.get("mask_truncated"):
        rollout["truncation"] = "mask_after"
    train = {key: settings[key] for key in ("reference_sync_steps",) if key in settings}
    return {"rollout": rollout, "train": train}


def _with_overlong(data: dict[str, Any], buffer: int) -> dict[str, Any]:
    """Add the preset's length punishment, unless the recipe has one (of weight 0: none)."""
    reward = data.get("reward")
    if not isinstance(reward, dict):
        return data
    parts = reward.get("parts")
    if not isinstance(parts, list) or any(_kind(part) == _OVERLONG for part in parts):
        return data
    rollout = data["rollout"] if isinstance(data["rollout"], dict) else {}
    budget = rollout.get("max_tokens", RolloutSettings().max_tokens)
    if isinstance(budget, int) and budget > 0:
        buffer = min(buffer, max(budget // _BUFFER_SHARE, 1))
    part = {"name": "overlong", "kind": _OVERLONG, "buffer": buffer}
    return {**data, "reward": {**reward, "parts": [*parts, part]}}


def _kind(part: object) -> object:
    return part.get("kind") if isinstance(part, dict) else None
