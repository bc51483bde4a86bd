"""Are margins probabilities? Reliability of σ(margin) over pairs whose better side is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_BINS = 10


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs whose confidence lies in [low, high); the last bin includes 1."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean of σ(|margin|): how sure of its own side."""
    accuracy: float
    """Share that took the right side; a tie counts half."""


def reliability_bins(margins: Sequence[float], num_bins: int = NUM_BINS) -> list[ReliabilityBin]:
    """The bins that hold a pair, lowest confidence first: equal widths over [0.5, 1].

    A margin says both which side is better (its sign) and with what probability, σ(|margin|) under
    Bradley-Terry, so confidence is never below one half: the confidence of the prediction, as in Guo et al.

    Args:
        margins: score of the better side minus that of the worse one, in nats.
    """
    values = np.asarray(margins, dtype=np.float64)
    confidence = _sigmoid(np.abs(values))
    right = np.where(values == 0, 0.5, values > 0)
    index = np.clip(((confidence - 0.5) * 2 * num_bins).astype(int), 0, num_bins - 1)
    bins = []
    for number in np.unique(index):
        inside = index == number
        low = 0.5 + 0.5 * int(number) / num_bins
        bins.append(
            ReliabilityBin(
                low,
                low + 0.5 / num_bins,
                int(inside.sum()),
                float(confidence[inside].mean()),
                float(right[inside].mean()),
            )
        )
    return bins


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Σ_b n_b/n · |accuracy_b - confidence_b|, in [0, 1]: Guo et al. 2017, arXiv:1706.04599, eq. 3."""
    total = sum(each.count for each in bins)
    return sum(each.count * abs(each.accuracy - each.confidence) for each in bins) / total


def brier_scores(margins: Sequence[float]) -> list[float]:
    """(1 - σ(margin))² a pair: 0 is sure and right, 1 sure and wrong, 0.25 undecided."""
    values = np.asarray(margins, dtype=np.float64)
    return ((1 - _sigmoid(values)) ** 2).tolist()


def log_losses(margins: Sequence[float]) -> list[float]:
    """-log σ(margin) a pair, nats: DPO's own loss where the margin is β times the log-ratio margin."""
    values = np.asarray(margins, dtype=np.float64)
    return np.logaddexp(0, -values).tolist()  # log(1 + e^-m): no overflow for any m


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -values))
