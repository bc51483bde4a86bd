"""Any objective without a script of its own: `accelerate launch recipes/preference.py RECIPE.yaml`."""

import sys

from prefopt.cli import recipe_main

if __name__ == "__main__":
    sys.exit(recipe_main("preference"))
