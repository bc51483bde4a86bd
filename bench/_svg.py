"""Line and dot charts as one self-contained SVG: enough for the benchmarks, without a plotting package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

COLOURS = ("#b2182b", "#ef8a62", "#4393c3", "#2166ac", "#5aae61", "#762a83", "#bf812d", "#666666",
           "#1b9e77", "#e7298a")  # fmt: skip
WIDTH, HEIGHT = 480, 320
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 32, 36
LEGEND_ROW = 18


@dataclass(frozen=True)
class Point:
    x: float
    y: float


@dataclass(frozen=True)
class Line:
    """One series; dots alone where its points are not ``joined``."""

    title: str
    points: Sequence[Point]
    joined: bool = True


@dataclass(frozen=True)
class Chart:
    """One panel. The y axis of all panels runs from 0 to the next tenth above what any of them holds."""

    title: str
    lines: Sequence[Line]
    x_ticks: Sequence[tuple[float, str]]
    level: tuple[str, float] | None = None
    """A labelled horizontal line."""


def write_svg(path: Path, charts: Sequence[Chart]) -> None:
    """Writes the charts side by side, with one legend for their common series below."""
    legend = [line.title for line in charts[0].lines]
    width, height = WIDTH * len(charts), HEIGHT + LEGEND_ROW * (len(legend) + 1)
    highest = max(point.y for chart in charts for line in chart.lines for point in line.points)
    tenths = max(1, math.ceil(highest * 10))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for index, chart in enumerate(charts):
        parts.append(f'<g transform="translate({index * WIDTH},0)">{_panel(chart, tenths)}</g>')
    for index, title in enumerate(legend):
        y = HEIGHT + LEGEND_ROW * (index + 0.5)
        parts.append(
            f'<rect x="{LEFT}" y="{y - 9}" width="22" height="4" fill="{_colour(index)}"/>'
        )
        parts.append(_text(LEFT + 30, y - 3, title))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _panel(chart: Chart, tenths: int) -> str:
    xs = [x for x, _ in chart.x_ticks]
    margin = (max(xs) - min(xs)) * 0.06 or 1.0
    low, high = min(xs) - margin, max(xs) + margin

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value * 10 / tenths * (HEIGHT - TOP - BOTTOM)

    parts = [_text(LEFT, 18, chart.title)]
    for tenth in range(tenths + 1):
        at = y(tenth / 10)
        parts.append(_rule(LEFT, at, WIDTH - RIGHT, at, "#ddd"))
        parts.append(_text(LEFT - 6, at + 4, f"{tenth / 10:g}", anchor="end"))
    parts += [
        _text(x(v), HEIGHT - BOTTOM + 18, label, anchor="middle") for v, label in chart.x_ticks
    ]
    if chart.level is not None:
        at = y(chart.level[1])
        parts.append(_rule(LEFT, at, WIDTH - RIGHT, at, "#777", dashed=True))
        parts.append(_text(WIDTH - RIGHT, at - 4, chart.level[0], anchor="end"))
    for index, line in enumerate(chart.lines):
        spots = [(x(p.x), y(p.y)) for p in line.points]
        if line.joined:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in spots)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{_colour(index)}" stroke-width="2"/>'
            )
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{_colour(index)}"/>' for a, b in spots
        ]
    return "\n".join(parts)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rule(
    x: float, y: float, x_end: float, y_end: float, colour: str, *, dashed: bool = False
) -> str:
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x_end:.1f}" y2="{y_end:.1f}" stroke="{colour}"{dashes}/>'
