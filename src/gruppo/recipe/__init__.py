"""Recipes: TOML and overrides to one checked record, and from there to the objects of a run."""

from gruppo.recipe.load import from_table, load
from gruppo.recipe.mistakes import Mistake, RecipeError
from gruppo.recipe.recipe import Recipe
from gruppo.recipe.source import packaged

__all__ = ["Mistake", "Recipe", "RecipeError", "from_table", "load", "packaged"]
