"""Reward against KL from the reference, a point a result: what each unit of drift bought."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eval.base import Metric
from eval.comparison.outputs import Output
from prefopt.errors import ConfigError, suggest

KL_TASK, KL_METRIC = "kl", "kl"
_REWARDS = ("signals.reward", "win_rate.win_rate")
"""Tried in this order where none is named."""

_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Point:
    """One result."""

    name: str
    run: str
    step: int | None
    kl: Metric
    """Nats a response."""
    reward: Metric
    on_front: bool
    """No other point has as little KL and as much reward, and less or more of one."""


@dataclass(frozen=True)
class Frontier:
    """Results that have both numbers."""

    reward: str
    """``task.metric``."""
    direction: str
    points: tuple[Point, ...]
    without: tuple[str, ...]
    """Results that lack either."""


def frontier(outputs: Sequence[Output], reward: str | None = None) -> Frontier | None:
    """The frontier; None if fewer than two results have the KL and a reward.

    Args:
        outputs: in the order points are to be listed.
        reward: ``TASK.METRIC``; default: the first that two have of ``signals.reward`` and ``win_rate.win_rate``.

    Raises: ConfigError if ``reward`` is named and no result has it, or fewer than two have it with a KL.
    """
    if reward is not None:
        _check_known(outputs, reward)
    for name in (reward,) if reward else _REWARDS:
        found = [
            (output, kl, value)
            for output in outputs
            if (kl := _metric(output, f"{KL_TASK}.{KL_METRIC}"))
            and (value := _metric(output, name))
        ]
        if len(found) >= 2:
            return _frontier(name, outputs, found)
    if reward is not None:
        raise ConfigError(
            f"--reward {reward}: fewer than two results have it and {KL_TASK}.{KL_METRIC}, the other axis; "
            f"evaluate with --tasks {reward.rpartition('.')[0]},{KL_TASK}"
        )
    return None


def _frontier(
    name: str, outputs: Sequence[Output], found: Sequence[tuple[Output, Metric, Metric]]
) -> Frontier:
    direction = found[0][0].tasks[name.rpartition(".")[0]].direction
    sign = -1.0 if direction == "lower" else 1.0
    front = pareto([(kl.value, sign * value.value) for _, kl, value in found])
    points = tuple(
        Point(output.name, output.run, output.step, kl, value, on_front)
        for (output, kl, value), on_front in zip(found, front, strict=True)
    )
    held = {point.name for point in points}
    without = tuple(output.name for output in outputs if output.name not in held)
    return Frontier(name, direction, points, without)


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which ``(cost, gain)`` no other dominates: costs no more and gains no less, one of them strictly."""
    return [
        not any(
            other != point and other[0] <= point[0] and other[1] >= point[1] for other in points
        )
        for point in points
    ]


def root(kl: Metric) -> Metric:
    """sqrt(KL), in which reward rises about linearly at first, with the 95 % interval of the KL under the root.

    An estimate below 0 (a KL of few samples may be) is at 0: it has no root.
    Source: Bai et al. 2022, arXiv:2204.05862, section 4.3.
    """
    bounds = interval_of(kl)
    low_high = bounds and (math.sqrt(max(bounds[0], 0.0)), math.sqrt(max(bounds[1], 0.0)))
    return Metric(math.sqrt(max(kl.value, 0.0)), None, low_high)


def interval_of(metric: Metric) -> tuple[float, float] | None:
    """The benchmark's own interval, else ± 1.96 standard errors; None without either."""
    if metric.interval is not None or metric.stderr is None:
        return metric.interval
    spread = _NORMAL_95 * metric.stderr
    return metric.value - spread, metric.value + spread


def _metric(output: Output, name: str) -> Metric | None:
    task, _, metric = name.rpartition(".")
    found = output.tasks[task].metrics.get(metric) if task in output.tasks else None
    return None if found is None or math.isnan(found.value) else found


def _check_known(outputs: Sequence[Output], reward: str) -> None:
    known = {
        f"{task}.{metric}"
        for output in outputs
        for task, result in output.tasks.items()
        for metric in result.metrics
    }
    if reward not in known:
        raise ConfigError(f"--reward {reward}: no result has it; {suggest(reward, known)}")
