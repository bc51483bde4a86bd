"""The room of pages: values stay text, and charts have everything where their axes say."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from prefopt.errors import DataError
from prefopt.report.charts import SERIES, Axis, Line, Mark, Point, Row, dots, histogram, ticks, xy
from prefopt.report.pages import render, write_text
from tests.unit.html_tree import Element, Tree, assert_asks_for_nothing_and_runs_nothing

ROOT = Path(__file__).resolve().parent.parent.parent
HOSTILE = "<script>alert('x')</script></div><b onclick=\"go()\">&amp; “q” \x00\x1b"
SHOWN = "<script>alert('x')</script></div><b onclick=\"go()\">&amp; “q” \ufffd\ufffd"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "one.html.j2"
    path.write_text(
        '{% extends "page.html.j2" %}{% from "parts.html.j2" import list, table, text %}'
        "{% block title %}{{ words }}{% endblock %}"
        "{% block main %}<h1>{{ words }}</h1>{{ text(words) }}{{ list([words]) }}"
        "{{ table([words], [[words]]) }}{{ chart }}{% endblock %}"
    )
    return path


def test_a_value_is_text_wherever_it_is_put(template: Path) -> None:
    marks = (Mark(1.0, None, 0, HOSTILE),)
    chart = dots([Row(HOSTILE, HOSTILE, marks)], title=HOSTILE, series=[HOSTILE])
    chart += xy([Point(1, 1, HOSTILE)], title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE)
    chart += histogram([0, 1], {HOSTILE: [1], "other": [1]}, title=HOSTILE)
    tree = Tree(render(template, words=HOSTILE, chart=chart))
    assert_asks_for_nothing_and_runs_nothing(tree)
    for tag in ("title", "h1", "li", "th", "td", "figcaption", "p", "span"):
        assert SHOWN in [e.words for e in tree.all(tag)], tag
    assert SHOWN in [e.words for e in tree.all("div", "text")]
    assert f"{SHOWN}: {SHOWN}" in [e.attributes.get("aria-label") for e in tree.all("svg")]


def test_a_page_is_a_whole_document_for_any_screen(template: Path) -> None:
    page = render(template, words="w", chart="")
    assert page.startswith("<!doctype html>\n<html lang=")
    metas = {e.attributes.get("name"): e.attributes["content"] for e in Tree(page).all("meta")[1:]}
    del metas[None]  # the policy
    assert metas == {
        "viewport": "width=device-width, initial-scale=1",
        "color-scheme": "light dark",
    }


def test_a_name_that_a_template_is_not_given_is_an_error(template: Path) -> None:
    with pytest.raises(UndefinedError, match="'chart' is undefined"):
        render(template, words="w")


def test_a_page_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"page\.html: cannot be written"):
        write_text(tmp_path / "file" / "page.html", "")


def test_every_template_is_in_the_wheel() -> None:
    """By the patterns of package data; setuptools reads ``**`` as any folder, none included."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package).glob(pattern)
    }
    packages = [ROOT / name for name in ("prefopt", "eval", "data_pipelines")]
    files = {p for folder in packages for p in folder.rglob("*") if p.suffix in (".j2", ".css")}
    assert len(files) >= 6 and files <= packed


# -- axes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, (0, 2, 4, 6, 8, 10)),
        (-0.3, 1.1, (0.0, 0.5, 1.0)),
        (21, 58, (30, 40, 50)),
        (-1e-3, 1e-3, (-1e-3, -5e-4, 0, 5e-4, 1e-3)),
    ],
)
def test_ticks_are_few_round_numbers_within_the_axis(
    low: float, high: float, expected: tuple[float, ...]
) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("most", "expected"),
    [(0, (0, 1)), (1, (0, 1)), (3, (0, 1, 2, 3)),
     (7, (0, 2, 4, 6, 8)), (148, (0, 50, 100, 150)), (200, (0, 50, 100, 150, 200))],
)  # fmt: skip
def test_an_axis_of_counts_has_whole_numbers_and_ends_at_one(
    most: int, expected: tuple[float, ...]
) -> None:
    axis = Axis.counts(most)
    assert axis.ticks == expected
    assert axis.at(0) == 100 and axis.at(expected[-1]) == 0


def test_labels_tell_neighbours_apart() -> None:
    assert [Axis(-1, 1, (-0.5, 0.0, 0.5)).label(t) for t in (-0.5, 0.0, 0.5)] == [
        "−0.5", "0.0", "0.5",
    ]  # fmt: skip
    assert Axis(0, 4e3, (0, 2e3, 4e3)).label(4e3) == "4,000"


# -- charts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [(5.0,), (0.0, 0.0), (1e-9, 2e-9), (-3e6, 4e6)])
def test_charts_of_any_numbers_stay_inside_their_frame(values: tuple[float, ...]) -> None:
    rows = [Row("x", "", (Mark(value, None, 0, ""),)) for value in values]
    points = [Point(value, value, "") for value in values]
    for drawn in (dots(rows, title="t"), xy(points, title="t", x_label="x", y_label="y")):
        circles = Tree(drawn).all("circle")
        assert len(circles) == len(values)
        assert all(0 < circle.number("cx") < 100 for circle in circles)


def test_bars_have_the_place_and_height_of_their_counts() -> None:
    """Counts 0 to 4 on an axis to 4; each series has half a bin, nine tenths of it drawn."""
    drawn = histogram([0, 1, 3], {"a": [2, 4], "b": [0, 1]}, title="t")
    bars = [
        (each.number("x"), each.number("width"), each.number("y"), each.number("height"))
        for each in Tree(drawn).all("rect")
    ]
    third = 100 / 3
    assert bars == [
        pytest.approx((0, 0.45 * third, 50, 50), abs=0.01),
        pytest.approx((third, 0.9 * third, 0, 100), abs=0.01),
        pytest.approx((2 * third, 0.9 * third, 75, 25), abs=0.01),
    ]
    titles = [e.words for e in Tree(drawn).all("title")]
    assert titles == ["a, 0 to 1: 2", "a, 1 to 3: 4", "b, 1 to 3: 1"]


def _scale(texts: list[Element], place: str) -> tuple[float, float]:
    """``(a, b)`` of value = a · place + b, from two labels of an axis."""
    (low, high) = ((float(e.words.replace("−", "-")), e.number(place)) for e in texts[:2])
    slope = (high[0] - low[0]) / (high[1] - low[1])
    return slope, low[0] - slope * low[1]


def test_lines_go_through_their_values_as_the_axes_say() -> None:
    values = ((0.0, 3.0), (10.0, -1.0), (20.0, 2.0))
    drawn = xy([], [Line(values, 1), Line(values)], title="t", x_label="x", y_label="y")
    texts = Tree(drawn).all("text")
    (ax, bx), (ay, by) = (
        _scale([e for e in texts if e.attributes["text-anchor"] == anchor], place)
        for anchor, place in (("middle", "x"), ("end", "y"))
    )
    first, second = Tree(drawn).all("polyline")
    assert (first.classes, second.classes) == (["s1"], ["front"])
    pairs = [each.split(",") for each in (first.attributes["points"] or "").split()]
    found = [(ax * float(x) + bx, ay * float(y) + by) for x, y in pairs]
    assert found == [pytest.approx(value, abs=0.01) for value in values]


def test_error_bars_reach_both_ends_of_their_interval() -> None:
    points = [Point(0, 0, ""), Point(10, 10, "", 0, (8, 13), (5, 12))]
    tree = Tree(xy(points, title="t", x_label="x", y_label="y"))
    across, up = tree.all("line", "bar")
    texts = tree.all("text")
    a, b = _scale([e for e in texts if e.attributes["text-anchor"] == "middle"], "x")
    assert [a * across.number(n) + b for n in ("x1", "x2")] == pytest.approx([8, 13], abs=0.01)
    a, b = _scale([e for e in texts if e.attributes["text-anchor"] == "end"], "y")
    assert [a * up.number(n) + b for n in ("y1", "y2")] == pytest.approx([5, 12], abs=0.01)


def test_a_label_that_would_cover_another_is_left_to_hovering() -> None:
    points = [Point(1 + n / 1000, 1, f"point {n}") for n in range(12)] + [Point(2, 2, "alone")]
    tree = Tree(xy(points, title="t", x_label="x", y_label="y"))
    labels = [e.words for e in tree.all("text", "label")]
    assert "alone" in labels and 1 < len(labels) < 6
    assert [e.words for e in tree.all("title")] == [point.label for point in points]


def test_more_series_than_colours_repeat_them() -> None:
    marks = tuple(Mark(float(n), None, n, "") for n in range(SERIES + 1))
    drawn = Tree(dots([Row("x", "", marks)], title="t"))
    assert [e.classes for e in drawn.all("g")][-2:] == [[f"s{SERIES - 1}"], ["s0"]]
