"""Rounds of sampling and training: `python recipes/iterative_dpo.py recipes/iterative_dpo/NAME.yaml …`.

The same as `prefopt data round`. Start it once, and not through `accelerate launch`: it launches the training
of each round itself, with what the file's `launch` says.
"""

import sys

from data_pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main(["round", *sys.argv[1:]]))
