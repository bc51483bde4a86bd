"""The quickstart's verifier as a signal: the plugin of ``online.yaml``, and the shape of one of your own."""

from __future__ import annotations

import sys
from pathlib import Path

from prefopt.recipe.registry import signal
from prefopt.signals.base import Signal, per_response

# `recipes` is not an installed package, and a recipe may be run from any working directory.
sys.path.append(str(Path(__file__).resolve().parents[2]))


@signal("sorted_digits", source="recipes/quickstart/task.py")
def sorted_digits() -> Signal:
    """1.0 for exactly the prompt's digits in rising order, else 0.0: the task's own program."""
    from recipes.quickstart.task import score_group

    return per_response(lambda prompt, text: score_group(prompt.text, [text])[0])
