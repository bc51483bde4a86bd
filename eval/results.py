"""Summaries as JSON: what ``--json`` prints and ``results.json`` holds."""

from __future__ import annotations

import math
from typing import Any

from eval.base import Metric, Summary


def flat(summary: Summary) -> dict[str, Any]:
    """One object: ``accuracy``, ``accuracy_standard_error``, ``accuracy_interval``, counts, groups, notes."""
    result: dict[str, Any] = {}
    for name, metric in summary.metrics.items():
        result |= _metric(name, metric)
    result |= dict(summary.counts)
    if summary.groups:
        result["groups"] = {key: dict(values) for key, values in summary.groups.items()}
    if summary.notes:
        result["notes"] = list(summary.notes)
    return result


def metrics_json(summary: Summary) -> dict[str, Any]:
    """Metrics, counts, groups and notes of a summary, as ``results.json`` nests them."""
    return {
        "metrics": {
            name: {
                "value": _number(metric.value),
                "stderr": None if metric.stderr is None else _number(metric.stderr),
                "interval": metric.interval and [_number(bound) for bound in metric.interval],
            }
            for name, metric in summary.metrics.items()
        },
        "counts": dict(summary.counts),
        "groups": {key: dict(values) for key, values in summary.groups.items()},
        "notes": list(summary.notes),
    }


def _metric(name: str, metric: Metric) -> dict[str, Any]:
    found: dict[str, Any] = {name: _number(metric.value)}
    if metric.stderr is not None:
        found[f"{name}_standard_error"] = _number(metric.stderr)
    if metric.interval is not None:
        found[f"{name}_interval"] = [_number(bound) for bound in metric.interval]
    return found


def _number(value: float) -> float | None:
    """JSON has no NaN: a number that there is not is null."""
    return None if math.isnan(value) or math.isinf(value) else float(value)
