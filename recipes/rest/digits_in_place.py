"""A graded reward for the quickstart's task, so that thresholds have something to rise on: a plugin."""

from __future__ import annotations

import sys
from pathlib import Path

from prefopt.recipe.registry import signal
from prefopt.signals.base import Signal, per_response

# `recipes` is not an installed package, and a schedule may be run from any working directory.
sys.path.append(str(Path(__file__).resolve().parents[2]))


@signal("digits_in_place", source="recipes/quickstart/task.py")
def digits_in_place() -> Signal:
    """The share of places that hold the right digit, 0 to 1."""
    from recipes.quickstart.task import share_in_place

    return per_response(lambda prompt, text: share_in_place(prompt.text, text))
