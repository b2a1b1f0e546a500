"""Loading a recipe: text and overrides to a checked ``Recipe``, or one error with every mistake.

No model, data set or reward is opened, and nothing is written. Custom parts are imported, because
whether they exist is part of the check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from gruppo.recipe.check import check_section
from gruppo.recipe.fields import hints, record_for
from gruppo.recipe.mistakes import Mistake, RecipeError, did_you_mean, mistake, nearest
from gruppo.recipe.preset import lay_under
from gruppo.recipe.recipe import Recipe
from gruppo.recipe.rules import find_conflicts
from gruppo.recipe.source import find_unusable_numbers, override, parse, read


def load(name: str, settings: Iterable[str] = ()) -> Recipe:
    """Load the recipe file (or packaged recipe) ``name``, with ``section.key=value`` settings.

    Raises:
        RecipeError: the file, a setting or the recipe is wrong; the text lists every mistake.
    """
    return from_table(override(parse(read(name), name), settings), name)


def from_table(data: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """The recipe of nested tables as TOML gives them. Raises RecipeError, as ``load``."""
    known = hints(Recipe)
    mistakes = [m for name in data if name not in known for m in _unknown(name, data[name], known)]
    unusable = find_unusable_numbers(data)
    if unusable:
        raise RecipeError([*mistakes, *unusable], source)
    tables, wrong = lay_under(data)
    mistakes += wrong
    sections: dict[str, Any] = {}
    for entry in fields(Recipe):
        if entry.name not in tables and entry.default_factory is MISSING:
            mistakes.append(mistake(entry.name, f"section [{entry.name}] is required"))
            continue
        checked = check_section(entry.name, known[entry.name], tables.get(entry.name, {}))
        mistakes += checked.mistakes
        if not checked.mistakes:
            sections[entry.name] = checked.value
    mistakes += find_conflicts(sections)
    if mistakes:
        raise RecipeError(_once(mistakes), source)
    return Recipe(**sections)


def _unknown(name: str, table: object, known: Mapping[str, Any]) -> list[Mistake]:
    """What is wrong with a section that there is not: its name, or that its keys are another's."""
    keys = table if isinstance(table, dict) and nearest(name, known) is None else {}
    found = []
    for section, annotation in known.items():
        record = record_for(annotation, {})
        for key in keys if record is not None else ():
            if key in hints(record):
                reason = f'unknown section; did you mean "{section}.{key}"?'
                found.append(mistake(f"{name}.{key}", reason, keys[key]))
    return found or [mistake(name, did_you_mean(name, list(known), "section"))]


def _once(mistakes: Iterable[Mistake]) -> list[Mistake]:
    """Without repetitions, in the order found."""
    return list(dict.fromkeys(mistakes))
