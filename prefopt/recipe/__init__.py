"""Recipes: schema, reading, checking. Nothing here imports torch unless an objective is looked up."""

from prefopt.recipe.load import load_recipe
from prefopt.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe"]
