"""DPO: `accelerate launch recipes/dpo.py recipes/dpo/zephyr-7b-full.yaml [section.key=value …]`."""

import sys

from prefopt.cli import recipe_main

if __name__ == "__main__":
    sys.exit(recipe_main("dpo"))
