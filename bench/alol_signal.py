"""The graded reward as a signal: what the `score` stage of bench/claims_alol.py asks."""

from __future__ import annotations

import sys
from pathlib import Path

from prefopt.recipe.registry import signal
from prefopt.signals.base import Signal, per_response

# neither `bench` nor `recipes` is an installed package
sys.path.append(str(Path(__file__).resolve().parents[1]))


@signal("graded_digits", source="bench/_sorting_rewards.py")
def graded_digits() -> Signal:
    """1 less the share of wrong digits of the answer."""
    from bench._sorting_rewards import reward

    return per_response(lambda prompt, text: reward(prompt.text, text))
