"""The A-LoL family: `accelerate launch recipes/a_lol.py recipes/a_lol/hh-qlora.yaml [section.key=value …]`."""

import sys

from prefopt.cli import recipe_main

if __name__ == "__main__":
    sys.exit(recipe_main("a_lol"))
