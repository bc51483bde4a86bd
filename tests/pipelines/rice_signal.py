"""A plugin for tests: a signal that is fond of prompts with rice in them, and of short answers."""

from __future__ import annotations

from prefopt.recipe.registry import signal
from prefopt.signals.base import Signal, per_response
from prefopt.types import Prompt


@signal("rice", source="tests")
def rice() -> Signal:
    """0.6 for a prompt with rice, 0.1 for another, and up to 0.4 for a short response."""

    def score(prompt: Prompt, text: str) -> float:
        return (0.6 if "rice" in prompt.text else 0.1) + 0.4 / (1 + len(text))

    return per_response(score)
