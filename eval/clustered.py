"""Means whose observations come in clusters: two turns of a question, two games of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eval.base import Metric


def clustered_mean(clusters: Sequence[tuple[float, float]], scale: float = 1.0) -> Metric:
    """The mean over all observations, with a standard error that lets those of a cluster depend on each other.

        m = Σ_q s_q / Σ_q n_q
        SE = sqrt( Q/(Q-1) · Σ_q (s_q - m n_q)² ) / Σ_q n_q

    the linearised standard error of a ratio of totals; with one observation a cluster it is that of the mean
    (ddof 1).

    Args:
        clusters: ``(s_q, n_q)``: sum and number (or weight) of a cluster's observations; those of weight 0 are
            left out.
        scale: multiplies both numbers.

    Returns: no standard error of fewer than two clusters.
    Raises: ValueError for no observations.
    Source: Cochran 1977, Sampling Techniques, 3rd ed., eq. 6.13 (ratio of totals), with f = 0.
    """
    kept = [pair for pair in clusters if pair[1] > 0]
    if not kept:
        raise ValueError("the mean of nothing")
    # fsum: exact, so that the order of clusters does not change the last digit
    weight = math.fsum(number for _, number in kept)
    mean = math.fsum(total for total, _ in kept) / weight
    stderr = None
    if len(kept) > 1:
        squares = math.fsum((total - mean * number) ** 2 for total, number in kept)
        stderr = math.sqrt(len(kept) / (len(kept) - 1) * squares) / weight * scale
    return Metric(mean * scale, stderr)
