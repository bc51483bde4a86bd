"""Means, standard errors and counts that several tasks report. Plain numpy; fp64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from eval.base import Metric, Row


def mean_metric(values: Sequence[float], scale: float = 1.0) -> Metric:
    """Mean and standard error of the mean (ddof 1), times ``scale``; no standard error of fewer than two.

    Raises: ValueError for no values.
    """
    if not len(values):
        raise ValueError("the mean of nothing")
    array = np.asarray(values, dtype=np.float64)
    stderr = float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else None
    return Metric(float(array.mean()) * scale, None if stderr is None else stderr * scale)


def values_of(rows: Iterable[Row], name: str) -> list[float]:
    """The values of that name that are not None."""
    return [value for row in rows if (value := row.values.get(name)) is not None]


def problem_counts(rows: Iterable[Row]) -> dict[str, int]:
    """``{"num_<problem>": count}``."""
    return {
        f"num_{problem}": count
        for problem, count in sorted(Counter(row.problem for row in rows if row.problem).items())
    }


def group_means(
    rows: Iterable[Row], by: str, name: str, scale: float = 1.0
) -> Mapping[str, Mapping[str, float]]:
    """Means of a value by one of the rows' details, e.g. the category."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if by in row.details and (value := row.values.get(name)) is not None:
            groups.setdefault(str(row.details[by]), []).append(value)
    return {key: {name: float(np.mean(values)) * scale} for key, values in sorted(groups.items())}


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
