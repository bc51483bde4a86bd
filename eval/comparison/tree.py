"""What a comparison holds: a tree of plain values that the table, the JSON and the page are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from eval.base import Metric
from eval.comparison.comparability import Mismatch
from eval.comparison.frontier import Frontier, Point
from eval.comparison.outputs import Output, Side, TaskResult
from eval.comparison.paired import LEVEL, Difference

_FORMAT = 1


@dataclass(frozen=True)
class Contrast:
    """One example that two models did differently."""

    key: str
    difference: float
    """Second minus first, in the unit of the rows."""
    first: Side
    second: Side


@dataclass(frozen=True)
class Pair:
    """Two results of one task, example by example."""

    first: str
    second: str
    difference: Difference | None
    """In `TaskComparison.unit`."""
    p_holm: float | None
    """Corrected for all differences of the comparison."""
    unpaired: str | None
    """Why there is no difference."""
    num_only_first: int
    num_only_second: int
    num_without_value: int
    """Examples of both where either has none: no verdict, no number."""
    wins: tuple[Contrast, ...]
    """Where the second is better (higher, if the task has no better), largest difference first."""
    losses: tuple[Contrast, ...]


@dataclass(frozen=True)
class TaskComparison:
    """One task that at least two results have."""

    name: str
    results: Mapping[str, TaskResult]
    """By result; the first is what the others are compared with."""
    value_name: str | None
    """Which of the rows' values is paired; None if the first has no rows."""
    unit: str
    """Of differences: ``percentage points``, or the headline's own."""
    of_rows: bool
    """Is the headline the mean of that value over the rows? A length-controlled win rate is not."""
    pairs: tuple[Pair, ...]
    mismatches: tuple[Mismatch, ...]
    """What would have been refused."""
    without: tuple[str, ...]
    """Results that lack the task."""

    @property
    def headline(self) -> str:
        return next(iter(self.results.values())).headline

    @property
    def direction(self) -> str:
        return next(iter(self.results.values())).direction

    @property
    def forced(self) -> bool:
        return bool(self.mismatches)


@dataclass(frozen=True)
class Comparison:
    """Two or more evaluations."""

    outputs: tuple[Output, ...]
    tasks: tuple[TaskComparison, ...]
    frontier: Frontier | None
    remarks: tuple[str, ...]
    """Differences that were not refused, and what was left out."""
    alone: Mapping[str, str]
    """Tasks that one result only has, and which."""
    seed: int
    resamples: int

    @property
    def forced(self) -> tuple[Mismatch, ...]:
        """What would have been refused without ``--force``; empty for a fair comparison."""
        return tuple(mismatch for task in self.tasks for mismatch in task.mismatches)


def win_words(direction: str) -> tuple[str, str]:
    """What the examples of `Pair.wins` and `Pair.losses` are called."""
    return ("higher", "lower") if direction == "none" else ("wins", "losses")


def oriented(difference: Difference, direction: str) -> tuple[int, int, int]:
    """Numbers of wins, losses and ties of the second; higher and lower where neither is better."""
    counts = (difference.num_higher, difference.num_lower)
    wins, losses = counts[::-1] if direction == "lower" else counts
    return wins, losses, difference.num_equal


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Everything but the texts of examples, as JSON."""
    frontier = comparison.frontier
    return {
        "format": _FORMAT,
        "forced": bool(comparison.forced),
        "forced_differences": [str(each) for each in comparison.forced],
        "remarks": list(comparison.remarks),
        "results": [
            {"name": each.name, "path": str(each.path), **each.head} for each in comparison.outputs
        ],
        "tasks": {task.name: _task(task) for task in comparison.tasks},
        "tasks_of_one_result": dict(comparison.alone),
        "frontier": frontier
        and {
            "reward": frontier.reward,
            "direction": frontier.direction,
            "points": [_point(p) for p in frontier.points],
        },
        "bootstrap": {
            "seed": comparison.seed,
            "resamples": comparison.resamples,
            "level": LEVEL,
        },
    }


def _task(task: TaskComparison) -> dict[str, Any]:
    return {
        "headline": task.headline,
        "direction": task.direction,
        "forced": task.forced,
        "results": {
            name: {
                "version": result.version,
                "metrics": {metric: _metric(each) for metric, each in result.metrics.items()},
                "counts": dict(result.counts),
                "groups": {group: dict(values) for group, values in result.groups.items()},
                "notes": list(result.notes),
            }
            for name, result in task.results.items()
        },
        "results_without": list(task.without),
        "paired_value": task.value_name,
        "headline_is_mean_of_paired_value": task.of_rows,
        "unit": task.unit,
        "differences": [_pair(pair, task.direction) for pair in task.pairs],
    }


def _pair(pair: Pair, direction: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "first": pair.first,
        "second": pair.second,
        "unpaired": pair.unpaired,
        "num_only_first": pair.num_only_first,
        "num_only_second": pair.num_only_second,
        "num_without_value": pair.num_without_value,
    }
    if pair.difference is not None:
        statistics = asdict(pair.difference)
        for name in ("num_higher", "num_lower", "num_equal"):
            del statistics[name]
        won, lost = win_words(direction)
        counts = oriented(pair.difference, direction)
        names = (f"num_{won}", f"num_{lost}", "num_ties")
        found |= {**statistics, "p_holm": pair.p_holm, **dict(zip(names, counts, strict=True))}
    for name, contrasts in zip(win_words(direction), (pair.wins, pair.losses), strict=True):
        found[name] = [{"key": c.key, "difference": c.difference} for c in contrasts]
    return found


def _metric(metric: Metric) -> dict[str, Any]:
    return {
        "value": None if math.isnan(metric.value) else metric.value,
        "stderr": metric.stderr,
        "interval": metric.interval and list(metric.interval),
    }


def _point(point: Point) -> dict[str, Any]:
    return {
        "name": point.name,
        "step": point.step,
        "kl": _metric(point.kl),
        "reward": _metric(point.reward),
        "on_front": point.on_front,
    }
