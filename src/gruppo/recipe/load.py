"""Loading a recipe: text and overrides to a checked ``Recipe``, or one error with every mistake.

No model, data set or reward is opened, and nothing is written. Custom parts are imported, because
whether they exist is part of the check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from gruppo.recipe.check import check_section
from gruppo.recipe.fields import hints
from gruppo.recipe.mistakes import Mistake, RecipeError, did_you_mean, mistake
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
    mistakes = [mistake(n, did_you_mean(n, list(known), "section")) for n in data if n not in known]
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


def _once(mistakes: Iterable[Mistake]) -> list[Mistake]:
    """Without repetitions, in the order found."""
    return list(dict.fromkeys(mistakes))
