"""ReST and ReST-EM: `python recipes/rest.py recipes/rest/NAME.yaml …`.

The same as `prefopt data rest`. Start it once, and not through `accelerate launch`: it launches the training
of each improve step itself, with what the file's `launch` says.
"""

import sys

from data_pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main(["rest", *sys.argv[1:]]))
