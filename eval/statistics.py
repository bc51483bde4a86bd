"""Standard errors and counts that several tasks report. Plain numpy; fp64."""

from __future__ import annotations

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
