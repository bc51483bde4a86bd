"""ReST's thresholds: what each sample's reward must exceed, from the rewards of all or of its own prompt.

Source: Gulcehre et al. 2023, arXiv:2308.08998: a fixed τ, a percentile per source, and γ·max + (1 - γ)·mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ThresholdRule:
    """Exactly one of the three; ``above=None`` with the others absent keeps everything (τ = -∞)."""

    above: float | None = None
    """τ itself, in units of the reward."""
    percentile: float | None = None
    """τ is this percentile, 0 to 100, by numpy's `linear` definition: the value at place (n - 1)·p/100 of the n
    sorted rewards, between two of them in proportion."""
    gamma: float | None = None
    """τ = γ·max + (1 - γ)·mean."""
    over_all: bool = False
    """Of all rewards at once, and not prompt by prompt. A fixed τ knows no difference."""

    @property
    def name(self) -> str:
        """As a pipeline has it: ``percentile = 90 of each prompt``."""
        whose = "of all rewards" if self.over_all else "of each prompt"
        if self.percentile is not None:
            return f"percentile = {self.percentile:g} {whose}"
        if self.gamma is not None:
            return f"gamma = {self.gamma:g} {whose}"
        return "above = null" if self.above is None else f"above = {self.above:g}"


def thresholds(rewards: Array, prompts: Array, rule: ThresholdRule) -> Array:
    """(N,) float64 τ of each sample; what is kept has a reward above it.

    Args:
        rewards: (N,) float64, finite.
        prompts: (N,) int64 number of each sample's prompt.
        rule: see `ThresholdRule`.
    """
    if rule.percentile is None and rule.gamma is None:
        return np.full(len(rewards), -np.inf if rule.above is None else rule.above)
    found = np.empty(len(rewards))
    for members in [slice(None)] if rule.over_all else by_prompt(prompts):
        found[members] = _threshold(rewards[members], rule)
    return found


def by_prompt(prompts: Array) -> Iterator[Array]:
    """The places (K,) of each prompt's samples, in order."""
    order = np.argsort(prompts, kind="stable")
    starts = np.flatnonzero(np.diff(prompts[order])) + 1
    yield from np.split(order, starts) if len(order) else ()


def _threshold(rewards: Array, rule: ThresholdRule) -> float:
    if rule.percentile is not None:
        return float(np.percentile(rewards, rule.percentile, method="linear"))
    assert rule.gamma is not None
    best = rewards.max()
    # Clipped: the mean of equal rewards may come out an ulp below them, and "above" would keep them all.
    mean = np.clip(rewards.mean(), rewards.min(), best)
    return float(np.clip(rule.gamma * best + (1 - rule.gamma) * mean, mean, best))
