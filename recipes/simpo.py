"""SimPO: `accelerate launch recipes/simpo.py recipes/simpo/llama3-8b-instruct.yaml [section.key=value …]`."""

import sys

from prefopt.cli import recipe_main

if __name__ == "__main__":
    sys.exit(recipe_main("simpo"))
