"""Reward models from pairs: `accelerate launch recipes/reward_model.py RECIPE.yaml`."""

import sys

from prefopt.cli import recipe_main

if __name__ == "__main__":
    sys.exit(recipe_main("reward_model"))
