"""A checked recipe as TOML again, with every value written out.

What it gives loads to an equal recipe, also with a later version whose defaults differ.
"""

from __future__ import annotations

from dataclasses import fields

from gruppo.recipe.fields import NONE
from gruppo.recipe.recipe import Recipe
from gruppo.recipe.tables import to_table
from gruppo.recipe.toml import write_toml


def dump(recipe: Recipe) -> str:
    """The recipe as TOML text; ``from_table(parse(dump(recipe)))`` equals ``recipe``."""
    table = to_table(recipe)
    # A part that the recipe switched off would come back with its preset.
    table["objective"] = {
        entry.name: table["objective"].get(entry.name, NONE) for entry in fields(recipe.objective)
    }
    return write_toml(table)
