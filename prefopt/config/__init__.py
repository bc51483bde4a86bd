"""Recipes: schema, reading, checking. Nothing here imports torch unless an objective is looked up."""

from prefopt.config.load import load_recipe
from prefopt.config.schema import Recipe

__all__ = ["Recipe", "load_recipe"]
