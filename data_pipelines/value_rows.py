"""Rewards of rows as value heads see them: one range, the same for the head's training and for advantages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from prefopt.errors import DataError
from prefopt.recipe.yaml_file import Document, KeyPath


def reward_of(score: float, how: str) -> float:
    """The reward of a score: itself, or with ``sigmoid`` σ(score), as A-LoL takes a reward model's logit."""
    if how == "none":
        return score
    if score >= 0:  # either way exp's argument is not positive, so nothing overflows
        return 1 / (1 + math.exp(-score))
    return math.exp(score) / (1 + math.exp(score))


def require_in_range(
    rewards: Iterable[tuple[str, float]], max_value: float, stage_id: str, how: str
) -> None:
    """Returns if every reward lies in [0, max_value], all a head can say.

    Args:
        rewards: row id (``file:row`` where the file has no ids) and reward.
        max_value: of the head.
        stage_id: for the message.
        how: as in `reward_of`.

    Raises: DataError with the number of those outside, and the row of the smallest or largest.
    """
    found = list(rewards)
    outside = [each for each in found if not 0 <= each[1] <= max_value]
    if not outside:
        return
    id_, reward = max(outside, key=lambda each: max(-each[1], each[1] - max_value))
    smallest, largest = min(r for _, r in found), max(r for _, r in found)
    advice = f"Set max_value to the most a reward can be ({largest:g} or more)"
    if smallest < 0:
        advice = (
            "Set normalize_rewards: sigmoid (also for the head) if these are a reward model's logits, or score on "
            "a scale that starts at 0"
        )
    raise DataError(
        f"stage {stage_id!r}: {len(outside)} of {len(found)} rewards lie outside [0, max_value = {max_value:g}], "
        f"which is all a value head can predict (max_value · σ): the farthest is {reward:g}, row {id_}; they go "
        f"from {smallest:g} to {largest:g}. {advice}"
        + (f" (normalize_rewards: {how})" if how != "none" else "")
    )


def model_problems(document: Document, path: KeyPath, model: object, label: str) -> list[str]:
    """Keys of a ``model`` section that only training reads."""
    given = getattr(model, "model_fields_set", frozenset())
    return [
        f"{document.origin((*path, key))}{label}.{key}: would be ignored: only training reads it; leave it out"
        for key in ("layout", "disable_dropout")
        if key in given
    ]


def quantiles(numbers: Mapping[str, float], values: Iterable[float]) -> dict[str, float]:
    """Quantiles of some numbers by name, linear between order statistics; empty for none."""
    import numpy as np

    found = np.fromiter(values, dtype=np.float64)
    if not found.size:
        return {}
    return {name: float(np.quantile(found, share)) for name, share in numbers.items()}
