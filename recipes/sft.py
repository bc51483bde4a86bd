"""Supervised fine-tuning: `accelerate launch recipes/sft.py recipes/sft/x.yaml`."""

import sys

from prefopt.cli import recipe_main

if __name__ == "__main__":
    sys.exit(recipe_main("sft"))
