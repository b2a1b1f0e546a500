"""Presets under a recipe: what the recipe's tables look like once its preset is put below them.

Only tables are handled here; whether the outcome is sound is validated afterwards, as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gruppo.objective import PLANNED, PRESETS
from gruppo.recipe.fields import NONE
from gruppo.recipe.mistakes import Mistake, did_you_mean, mistake
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
    settings = dict(PRESETS[name].rollout)
    buffer = settings.pop("overlong_buffer", None)
    below = {"objective": {"preset": name, **to_table(PRESETS[name].objective)}}
    if objective.get("kl") == NONE:
        settings.pop("reference_sync_steps", None)  # a reference that nobody reads
    below |= _sections(settings)
    result = merge(below, {**data, "objective": {**objective, "preset": name}})
    if isinstance(buffer, int):
        result = _with_overlong(result, buffer)
    return result, mistakes


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
