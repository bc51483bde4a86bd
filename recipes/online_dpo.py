"""Rollouts, whatever the objective: `accelerate launch recipes/online_dpo.py recipes/online_dpo/NAME.yaml …`."""

import sys

from prefopt.cli import recipe_main

if __name__ == "__main__":
    sys.exit(recipe_main("online_dpo"))
