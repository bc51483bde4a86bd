"""Charts: a value a row with intervals, a histogram, points and lines on a plane.

Places are percent of the drawing, so a chart fills its box while text and strokes keep their size, on a phone as
at a desk. Colours are the style sheet's and follow light and dark. Python computes, ``charts.html.j2`` draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from prefopt.report.pages import environment

SERIES = 8
"""Colours of the style sheet; more series than this repeat them."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """From numbers to places, and the round numbers to write along it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    upward: bool = False
    """Grows from the bottom; places in SVG are counted from the top."""

    @classmethod
    def around(cls, values: Iterable[float], *, upward: bool = False) -> Axis:
        """An axis that holds all values, ends a little beyond them, and has three to six ticks.

        One value, or equal ones, stand in the middle of an axis that is a tenth of their size to each side.
        """
        values = list(values)
        low, high = min(values), max(values)
        margin = (high - low) * 0.05 or abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
        return cls(low, high, ticks(low, high), upward)

    @classmethod
    def counts(cls, most: int) -> Axis:
        """From 0 up to the first tick that is no lower than ``most``; whole numbers only."""
        step = max(1.0, _step(0, max(most, 1), 5))
        top = math.ceil(max(most, 1) / step)
        return cls(0, top * step, tuple(index * step for index in range(top + 1)), upward=True)

    def at(self, value: float) -> float:
        """The place of a value, in percent of the axis."""
        share = 100 * (value - self.low) / (self.high - self.low)
        return 100 - share if self.upward else share

    def __call__(self, value: float) -> str:
        """The place as SVG takes it."""
        return f"{self.at(value):.2f}%"

    def label(self, tick: float) -> str:
        """With as many digits as tell neighbours apart."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(tick) or 1.0
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return f"{tick:,.{digits}f}".replace("-", "−")


def ticks(low: float, high: float, most: int = 6) -> tuple[float, ...]:
    """The multiples between the bounds of the smallest of 1, 2, 5 · 10^n that gives no more than ``most``."""
    step = _step(low, high, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # + 0.0: a tick at -0.0 would be labelled so.
    return tuple(index * step + 0.0 for index in range(first, last + 1))


def _step(low: float, high: float, most: int) -> float:
    exponent = math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10):
        step = factor * 10.0**exponent
        if math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9) < most:
            return step
    return 20 * 10.0**exponent


@dataclass(frozen=True)
class Mark:
    """A value with its interval."""

    value: float
    interval: Interval | None
    series: int
    """Index of its colour."""
    title: str
    """Shown on hover, and read by screen readers."""
    hollow: bool = False


@dataclass(frozen=True)
class Row:
    """One line of `dots`: a label and its numbers above, marks below."""

    label: str
    text: str
    marks: tuple[Mark, ...]


def dots(
    rows: Sequence[Row], *, title: str, zero: bool = False, series: Sequence[str] = ()
) -> Markup:
    """Values on one horizontal axis, a row each.

    Args:
        zero: draw a line at 0 and keep it in view.
        series: whose the colours are, where they mean something.
    """
    values = [v for row in rows for mark in row.marks for v in (mark.value, *(mark.interval or ()))]
    x = Axis.around([*values, 0.0] if zero else values)
    return _draw("dots", title=title, x=x, rows=rows, zero=zero, series=series)


def histogram(edges: Sequence[float], series: Mapping[str, Sequence[int]], *, title: str) -> Markup:
    """Bars of counts over the bins between ``edges``, those of several series side by side."""
    x = Axis(edges[0], edges[-1], ticks(edges[0], edges[-1]))
    y = Axis.counts(max((max(counts) for counts in series.values()), default=0))
    bars = []
    for index, (name, counts) in enumerate(series.items()):
        for start, end, count in zip(edges, edges[1:], counts, strict=False):
            width = (x.at(end) - x.at(start)) / len(series)
            left = x.at(start) + index * width
            words = f"{name}, {_short(start)} to {_short(end)}: {count:,}"
            bars += (
                [(left, 0.9 * width, y(count), 100 - y.at(count), index, words)] if count else []
            )
    return _draw("histogram", title=title, x=x, y=y, bars=bars, series=list(series))


@dataclass(frozen=True)
class Point:
    """A place on a plane, with an interval each way."""

    x: float
    y: float
    label: str
    """Beside the point where there is room."""
    series: int = 0
    x_interval: Interval | None = None
    y_interval: Interval | None = None
    ringed: bool = False
    title: str = ""
    """Shown on hover; the label if empty."""


@dataclass(frozen=True)
class Line:
    """Places joined in their order; without a series dotted, in the colour of text."""

    points: tuple[tuple[float, float], ...]
    series: int | None = None


def xy(
    points: Sequence[Point],
    lines: Sequence[Line] = (),
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_zero: bool = False,
    series: Sequence[str] = (),
) -> Markup:
    """Points with error bars, lines, or both: a scatter plot, a frontier, a curve.

    Labels of points are left to hovering where they would cover others.

    Args:
        x_zero: keep x = 0 in view.
        series: whose the colours are, where they mean something.
    """
    joined = [place for line in lines for place in line.points]
    xs = [v for p in points for v in (p.x, *(p.x_interval or ()))] + [x for x, _ in joined]
    ys = [v for p in points for v in (p.y, *(p.y_interval or ()))] + [y for _, y in joined]
    x, y = Axis.around([*xs, 0.0] if x_zero else xs), Axis.around(ys, upward=True)
    return _draw(
        "xy", title=title, x=x, y=y, points=points, lines=lines, labels=_labels(points, x, y),
        x_label=x_label, y_label=y_label, series=series,
    )  # fmt: skip


_NARROW, _HEIGHT = 300.0, 260.0
"""A plane on a phone, in pixels: labels that have room there have it everywhere."""
_LONGEST = 22
"""Characters of a label beside a point."""


def _labels(points: Sequence[Point], x: Axis, y: Axis) -> list[tuple[Point, str, int, int, str]]:
    """Point, text, offsets in pixels and anchor of each label: the first of four places that covers nothing."""
    places = [(x.at(p.x) * _NARROW / 100, y.at(p.y) * _HEIGHT / 100) for p in points]
    taken = [(cx - 10, cy - 10, cx + 10, cy + 10) for cx, cy in places]
    found = []
    for point, (cx, cy) in zip(points, places, strict=True):
        text = point.label
        if len(text) > _LONGEST:  # cut in the middle: names of runs differ at both ends
            text = f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 + 1 :]}"
        width = 7.0 * len(text)
        for dx, dy in ((12, 14), (-12, -5), (12, -5), (-12, 14)):
            left = cx + dx if dx > 0 else cx + dx - width
            box = (left, cy + dy - 11, left + width, cy + dy + 2)
            inside = left >= 0 and left + width <= _NARROW + 20
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found.append((point, text, dx, dy, "start" if dx > 0 else "end"))
                break
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _draw(chart: str, **values: object) -> Markup:
    template = environment().get_template("charts.html.j2", globals={"SERIES": SERIES})
    return getattr(template.module, chart)(**values)
