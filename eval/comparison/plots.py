"""Plots as inline SVG, coloured by the page's style sheet so that they follow light and dark; no plotting package.

Drawn 520 units wide with text of 13, so that they can be read at a phone's width, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eval.comparison.markup import Markup, el, joined

WIDTH = 520
_EDGE = 10
_ROW = 40
_LANE = 9
_AXIS = 26
_MAX_LABEL = 44
SERIES = 8
"""Colours of the style sheet; more series than this repeat them."""


@dataclass(frozen=True)
class Mark:
    """A value with its interval."""

    value: float
    interval: tuple[float, float] | None
    series: int
    """Index of its colour."""
    title: str
    """Shown on hover, and read by screen readers."""
    hollow: bool = False


@dataclass(frozen=True)
class PlotRow:
    """One line of a dot plot: a label and its numbers above, marks below."""

    label: str
    text: str
    marks: tuple[Mark, ...]


def dot_plot(rows: Sequence[PlotRow], *, title: str, zero: bool = False) -> Markup:
    """Values on one horizontal axis, a row each; ``zero`` draws a line at 0 and keeps it in view."""
    bounds = [bound for row in rows for mark in row.marks for bound in _bounds(mark)]
    axis = Axis.around([*bounds, 0.0] if zero else bounds, _EDGE, WIDTH - _EDGE)
    parts: list[Markup] = []
    y = 0.0
    for row in rows:
        parts.append(_text(_EDGE, y + 16, _short(row.label), title=row.label))
        parts.append(_text(WIDTH - _EDGE, y + 16, row.text, anchor="end", class_="quiet"))
        for lane, mark in enumerate(row.marks):
            parts.append(_mark(axis, mark, y + 27 + lane * _LANE))
        y += _ROW + _LANE * (len(row.marks) - 1)
    grid = [
        el(
            "line",
            x1=axis(t),
            x2=axis(t),
            y1=2,
            y2=y + 2,
            class_="zero" if zero and not t else "grid",
        )
        for t in axis.ticks
    ]
    labels = [
        _text(axis(t), y + 18, axis.label(t), anchor="middle", class_="quiet") for t in axis.ticks
    ]
    return _svg(y + _AXIS, title, [*grid, *parts, *labels])


@dataclass(frozen=True)
class Spot:
    """A point of a scatter plot, with an interval each way."""

    x: float
    y: float
    x_interval: tuple[float, float] | None
    y_interval: tuple[float, float] | None
    label: str
    series: int
    ringed: bool


@dataclass(frozen=True)
class Path:
    """Points joined in their order."""

    points: tuple[tuple[float, float], ...]
    class_: str
    """``run``: in a series' colour; ``front``: dashed."""
    series: int = 0


def scatter(
    spots: Sequence[Spot], paths: Sequence[Path], *, title: str, x_label: str, y_label: str
) -> Markup:
    """Points with error bars; labels are left to hovering where they would cover others."""
    bottom, top = 320.0, 34.0
    xs = [bound for spot in spots for bound in (spot.x, *(spot.x_interval or ()))]
    ys = [bound for spot in spots for bound in (spot.y, *(spot.y_interval or ()))]
    x, y = Axis.around([0.0, *xs], 52, WIDTH - 24), Axis.around(ys, bottom, top)
    grid = [el("line", x1=52, x2=WIDTH - 8, y1=y(t), y2=y(t), class_="grid") for t in y.ticks]
    grid += [_text(46, y(t) + 4, y.label(t), anchor="end", class_="quiet") for t in y.ticks]
    grid += [_text(x(t), bottom + 20, x.label(t), anchor="middle", class_="quiet") for t in x.ticks]
    names = [
        _text(WIDTH / 2, bottom + 42, x_label, anchor="middle"),
        _text(_EDGE, 16, y_label),
    ]
    lines = [
        el(
            "polyline",
            points=" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in path.points),
            class_=f"{path.class_} {_series(path.series)}",
        )
        for path in paths
    ]
    dots = [_spot(spot, x, y) for spot in spots]
    return _svg(bottom + 54, title, [*grid, *names, *lines, *dots, *_spot_labels(spots, x, y)])


def legend(names: Sequence[str]) -> Markup:
    """Which colour is whose."""
    items = [
        el("span", el("i", class_=_series(index)), name, class_="key")
        for index, name in enumerate(names)
    ]
    return el("p", *items, class_="legend")


@dataclass(frozen=True)
class Axis:
    """From numbers to places, and the round numbers to write along it."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> Axis:
        """An axis that holds all values, ends a little beyond them, and has three to six ticks.

        One value, or equal ones, stand in the middle of an axis that is a tenth of their size to each side.
        """
        low, high = min(values), max(values)
        margin = (high - low) * 0.05 or abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
        return cls(low, high, start, end, ticks(low, high))

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def label(self, tick: float) -> str:
        """With as many digits as tell neighbours apart."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(tick) or 1.0
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return f"{tick:,.{digits}f}".replace("-", "−")


def ticks(low: float, high: float, most: int = 6) -> tuple[float, ...]:
    """The multiples between the bounds of the smallest of 1, 2, 5 · 10^n that gives no more than ``most``."""
    exponent = math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * 10.0**exponent
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    # + 0.0: a tick at -0.0 would be labelled so.
    return tuple(index * step + 0.0 for index in range(first, last + 1))


def _bounds(mark: Mark) -> tuple[float, ...]:
    return (mark.value, *(mark.interval or ()))


def _mark(axis: Axis, mark: Mark, y: float) -> Markup:
    parts = [el("title", mark.title)]
    if mark.interval is not None:
        low, high = (axis(bound) for bound in mark.interval)
        parts.append(el("line", x1=low, x2=high, y1=y, y2=y, class_="bar"))
    parts.append(
        el("circle", cx=axis(mark.value), cy=y, r=4.5, class_="hollow" if mark.hollow else "dot")
    )
    return el("g", *parts, class_=_series(mark.series))


def _spot(spot: Spot, x: Axis, y: Axis) -> Markup:
    cx, cy = x(spot.x), y(spot.y)
    parts = [el("title", spot.label)]
    if spot.x_interval is not None:
        low, high = (x(bound) for bound in spot.x_interval)
        parts.append(el("line", x1=low, x2=high, y1=cy, y2=cy, class_="bar thin"))
    if spot.y_interval is not None:
        low, high = (y(bound) for bound in spot.y_interval)
        parts.append(el("line", x1=cx, x2=cx, y1=low, y2=high, class_="bar thin"))
    if spot.ringed:
        parts.append(el("circle", cx=cx, cy=cy, r=9, class_="ring"))
    parts.append(el("circle", cx=cx, cy=cy, r=4.5, class_="dot"))
    return el("g", *parts, class_=_series(spot.series))


def _spot_labels(spots: Sequence[Spot], x: Axis, y: Axis) -> list[Markup]:
    """Each beside its point, in the first of four places that covers no point and no other label."""
    taken = [(x(s.x) - 6, y(s.y) - 6, x(s.x) + 6, y(s.y) + 6) for s in spots]
    labels = []
    for spot in spots:
        text = _short(spot.label, 22)
        width, cx, cy = 7.0 * len(text), x(spot.x), y(spot.y)
        corners = (
            (cx + 12, cy + 3),
            (cx - 12 - width, cy - 16),
            (cx + 12, cy - 16),
            (cx - 12 - width, cy + 3),
        )
        for left, upper in corners:
            box = (left, upper, left + width, upper + 13)
            if left < 52 or left + width > WIDTH or any(_overlap(box, other) for other in taken):
                continue
            taken.append(box)
            labels.append(_text(left, upper + 11, text))
            break
    return labels


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _series(index: int) -> str:
    return f"s{index % SERIES}"


def _short(text: str, most: int = _MAX_LABEL) -> str:
    """Cut in the middle: names of runs differ at both ends."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str | None = None,
    class_: str | None = None,
    title: str | None = None,
) -> Markup:
    hover = [el("title", title)] if title and title != text else []
    return el("text", *hover, text, x=x, y=y, text_anchor=anchor, class_=class_)


def _svg(height: float, title: str, parts: Sequence[Markup]) -> Markup:
    drawn = el(
        "svg", joined(parts), viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=title
    )
    return el("figure", el("figcaption", title), drawn)
