"""Histograms as inline SVG, in the style of the evaluation's plots: no script, no plotting package."""

from __future__ import annotations

from data_pipelines.card.findings import Histogram
from eval.comparison.markup import Markup, el
from eval.comparison.plots import WIDTH, Axis, legend, ticks

_LEFT, _TOP, _BOTTOM, _HEIGHT = 56.0, 12.0, 180.0, 204.0
_GAP = 1.0


def bars(found: Histogram) -> Markup:
    """Bars of each bin, those of several series side by side, with their counts on hovering."""
    names = list(found.series)
    most = max((max(counts) for counts in found.series.values()), default=0) or 1
    x = Axis(
        found.edges[0], found.edges[-1], _LEFT, WIDTH - 8, ticks(found.edges[0], found.edges[-1])
    )
    y = Axis(0, most, _BOTTOM, _TOP, ticks(0, most, 4))
    parts = [el("line", x1=_LEFT, x2=WIDTH - 8, y1=y(t), y2=y(t), class_="grid") for t in y.ticks]
    parts += [_label(_LEFT - 6, y(t) + 4, y.label(t), "end") for t in y.ticks]
    parts += [_label(x(t), _BOTTOM + 18, x.label(t), "middle") for t in x.ticks]
    for index, name in enumerate(names):
        parts += _series(found, name, index, x, y)
    drawn = el(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {_HEIGHT:.0f}", role="img", aria_label=found.title
    )
    keys = legend(names) if len(names) > 1 else Markup()
    return el("figure", el("figcaption", found.title), drawn, keys)


def _series(found: Histogram, name: str, index: int, x: Axis, y: Axis) -> list[Markup]:
    made = []
    for start, end, count in zip(found.edges, found.edges[1:], found.series[name], strict=False):
        if not count:
            continue
        width = (x(end) - x(start)) / len(found.series)
        title = f"{name}, {_number(start)} to {_number(end)}: {count:,}"
        made.append(
            el(
                "rect",
                el("title", title),
                x=x(start) + index * width + _GAP / 2,
                y=y(count),
                width=max(0.5, width - _GAP),
                height=_BOTTOM - y(count),
                class_=f"fill s{index}",
            )
        )
    return made


def _label(x: float, y: float, text: str, anchor: str) -> Markup:
    return el("text", text, x=x, y=y, text_anchor=anchor, class_="quiet")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
