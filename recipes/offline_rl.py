"""Samples weighed by reward: `accelerate launch recipes/offline_rl.py recipes/offline_rl/NAME.yaml …`."""

import sys

from prefopt.cli import recipe_main

if __name__ == "__main__":
    sys.exit(recipe_main("offline_rl"))
