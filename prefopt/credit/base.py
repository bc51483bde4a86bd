"""What a credit rule sees and says. Rules are pure and torch-free; `prefopt.recipe.registry.credit` names them."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupScores:
    """The responses to one prompt, as a credit rule sees them; all scores are finite."""

    rewards: tuple[float, ...]
    ids: tuple[tuple[int, ...], ...]
    """Token ids: two responses that are the same make no pair."""
    rng: random.Random
    """Seeded by run seed, step and prompt: a rule that draws gives the same labels after a resume."""
    offline: int | None = None
    """Index of the data set's own response among the responses, where the rule takes one."""


@dataclass(frozen=True)
class Labels:
    """Pairs as ``(chosen, rejected)`` indices, an advantage a response, or the reason there is nothing.

    A skipped group is counted under its reason as ``credit/<reason>_frac``; it is never trained on.
    """

    pairs: tuple[tuple[int, int], ...] = ()
    advantages: tuple[float, ...] | None = None
    skipped: str | None = None
    """``tie`` (no two scores differ enough), ``duplicate``, ``all_right``, ``all_wrong``, …"""
