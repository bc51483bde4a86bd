"""The comparison page: parsed, not matched; hostile texts, plots whose places are computed back to values."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.base import Metric, Row, Summary
from eval.comparison.compare import compare, print_comparison
from eval.comparison.page import page
from eval.statistics import group_means, mean_metric
from prefopt.cli import main
from tests.eval.result_dirs import A, B, checkpoint, entry, scored, write_output
from tests.unit.html_tree import Element, Tree, assert_asks_for_nothing_and_runs_nothing


@pytest.fixture
def plain(tmp_path: Path) -> Tree:
    return Tree(page(compare([scored(tmp_path / "a", A), scored(tmp_path / "b", B)], force=False)))


def test_page_asks_for_nothing_and_runs_nothing(plain: Tree) -> None:
    assert_asks_for_nothing_and_runs_nothing(plain)


def test_nothing_is_wider_than_a_phone_but_tables_that_scroll(plain: Tree) -> None:
    assert all("div" in e.parents for e in plain.all("table"))
    sized = [e for e in plain.elements if e.tag in ("svg", "table", "figure", "div")]
    assert {e.attributes.get("width") for e in sized} <= {None, "100%"}


def test_links_lead_to_places_on_the_page(plain: Tree) -> None:
    ids = [e.attributes["id"] for e in plain.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    targets = {(e.attributes["href"] or "").removeprefix("#") for e in plain.all("a")}
    assert targets and targets <= set(ids)


HOSTILE = "<script>alert('x')</script></div><b onclick=\"go()\">&amp; “q” \x00\x1b"


def test_texts_of_models_stay_texts(tmp_path: Path) -> None:
    texts = dict.fromkeys(A, (f"prompt {HOSTILE}", f"answer {HOSTILE}"))
    rows = [Row(k, {"accuracy": v}, {"verdict": HOSTILE}, HOSTILE) for k, v in A.items()]
    summary = Summary(
        {"accuracy": mean_metric([*A.values()], 100), HOSTILE: Metric(1.0)},
        {"n": 5},
        {HOSTILE: {"accuracy": 3.0}},
        (HOSTILE,),
    )
    first = write_output(
        tmp_path / "<i>a", {"quiz": (entry(summary), rows)}, texts, model={"path": HOSTILE}
    )
    tree = Tree(page(compare([first, scored(tmp_path / "b", B, texts=texts)], force=False)))
    assert_asks_for_nothing_and_runs_nothing(tree)
    shown = "<script>alert('x')</script></div><b onclick=\"go()\">&amp; “q” \ufffd\ufffd"
    answers = [e.words for e in tree.all("div", "text")]
    assert f"prompt {shown}" in answers and f"answer {shown}" in answers
    assert f"verdict: {shown}" in answers
    assert "against <i>a" in tree.all("h1")[0].words


def test_half_characters_do_not_stop_the_page(tmp_path: Path) -> None:
    texts = dict.fromkeys(A, ("\ud83d half", "whole 😀"))
    outputs = [scored(tmp_path / n, v, texts=texts) for n, v in (("a", A), ("b", B))]
    assert main(["eval", "compare", *map(str, outputs), "--output", str(tmp_path / "made")]) == 0
    written = (tmp_path / "made" / "comparison.html").read_text(encoding="utf-8")
    assert "\ufffd half" in written and "whole 😀" in written


def test_long_texts_are_folded_and_what_is_cut_is_counted(tmp_path: Path) -> None:
    texts = dict.fromkeys(A, ("short", "x" * 20123))
    outputs = [scored(tmp_path / n, v, texts=texts) for n, v in (("a", A), ("b", B))]
    tree = Tree(page(compare(outputs, force=False)))
    long = [e for e in tree.all("div", "text") if "xxx" in e.words]
    assert long and all(e.parents[-1] == "details" for e in long)
    assert all(e.words.endswith("… 123 more characters") for e in long)


def test_a_forced_comparison_says_so_wherever_it_shows_a_number(tmp_path: Path) -> None:
    outputs = [scored(tmp_path / "a", A), scored(tmp_path / "b", B, version="2")]
    tree = Tree(page(compare(outputs, force=True)))
    (alert,) = [e for e in tree.elements if e.attributes.get("role") == "alert"]
    assert "the task's version differs: 1 (a), 2 (b)" in alert.words
    assert "forced" in tree.all("h1")[0].words
    (section,) = [e for e in tree.all("h2") if e.attributes.get("id") == "task-0"]
    assert "forced" in section.words
    assert [e for e in tree.all("span", "label") if e.words.startswith("quiz, forced: b − a")]


def test_an_honest_comparison_is_not_marked(plain: Tree) -> None:
    body = "".join(e.words for e in plain.all("body"))
    assert "forced" not in body.lower()


def test_page_says_what_was_dropped_and_of_what(tmp_path: Path) -> None:
    rows = [Row("k1", {"accuracy": None}, problem="no_verdict")]
    rows += [Row(k, {"accuracy": v}) for k, v in A.items() if k != "k1"]
    summary = Summary(
        {"accuracy": mean_metric([0.5], 100)}, {"n": 5, "num_no_verdict": 1}, {}, ("a note",)
    )
    made = entry(summary, answers={"num_answers": 5, "num_cut": 2})
    first = write_output(tmp_path / "a", {"quiz": (made, rows)})
    found = compare([first, scored(tmp_path / "b", B | {"extra": 1.0})], force=False)
    items = [e.words for e in Tree(page(found)).all("li")]
    assert "a: 1 no verdict, 2 cut" in items and "a: a note" in items
    assert "b − a: 1 example only b has, left out" in items
    assert "b − a: 1 example without a value on one side or both, left out" in items


def test_provenance_marks_what_differs(tmp_path: Path) -> None:
    outputs = [
        scored(tmp_path / "a", A),
        scored(tmp_path / "b", B, head={"model": {"path": "models/other", "hash": "9" * 64}}),
    ]
    marked = [e.words for e in Tree(page(compare(outputs, force=False))).all("span", "warn")]
    assert "models/other" in marked and "9" * 64 in marked
    assert "float32" not in marked


# -- plots -----------------------------------------------------------------------------------------------------


def places(inside: list[Element]) -> dict[str, float]:
    """Where the horizontal axis of a chart has its numbers."""
    marked = [e for e in inside if e.tag == "text" and e.attributes["text-anchor"] == "middle"]
    return {e.words.replace("−", "-"): e.number("x") for e in marked}


def test_forest_draws_differences_and_intervals_where_the_axis_says(tmp_path: Path) -> None:
    outputs = [scored(tmp_path / name, values) for name, values in (("a", A), ("b", B))]
    found = compare(outputs, force=False)
    difference = found.tasks[0].pairs[0].difference
    assert difference is not None and difference.interval is not None
    inside = Tree(page(found)).figure("Second − first, in percentage points")
    (low, x_low), (high, x_high) = sorted((float(k), v) for k, v in places(inside).items())[:2]

    def value(x: float) -> float:
        return low + (x - x_low) / (x_high - x_low) * (high - low)

    (dot,) = [e for e in inside if e.tag == "circle"]
    (bar,) = [e for e in inside if e.tag == "line" and "bar" in e.classes]
    (zero,) = [e for e in inside if e.tag == "line" and "zero" in e.classes]
    assert value(dot.number("cx")) == pytest.approx(difference.mean, abs=0.1)
    drawn = (value(bar.number("x1")), value(bar.number("x2")))
    assert drawn == pytest.approx(difference.interval, abs=0.1)
    assert value(zero.number("x1")) == pytest.approx(0, abs=0.1)
    assert "hollow" in dot.classes  # p = 0.6


def test_a_dot_is_filled_where_the_difference_is_significant(tmp_path: Path) -> None:
    few = {f"k{n}": float(n < 5) for n in range(60)}
    many = {f"k{n}": float(n < 40) for n in range(60)}
    found = compare([scored(tmp_path / "a", few), scored(tmp_path / "b", many)], force=False)
    inside = Tree(page(found)).figure("Second − first, in percentage points")
    assert [e.classes for e in inside if e.tag == "circle"] == [["dot"]]


def test_groups_are_plotted_by_category(tmp_path: Path) -> None:
    def output(name: str, values: dict[str, float]) -> Path:
        rows = [
            Row(k, {"accuracy": v}, {"topic": "maths" if k < "k3" else "law"})
            for k, v in values.items()
        ]
        groups = group_means(rows, "topic", "accuracy", 100)
        summary = Summary({"accuracy": mean_metric([*values.values()], 100)}, {}, groups)
        return write_output(tmp_path / name, {"quiz": (entry(summary), rows)})

    tree = Tree(page(compare([output("a", A), output("b", B)], force=False)))
    inside = tree.figure("accuracy by group")
    assert len([e for e in inside if e.tag == "circle"]) == 4
    words = [e.words for e in inside if e.tag == "span"]
    assert {"maths", "law", "50.00 | 100.00", "33.33 | 66.67"} <= set(words)


@pytest.mark.parametrize("groups", [{}, {"law": {}}, {"law": {"accuracy": float("nan")}}])
def test_groups_without_numbers_draw_nothing(
    tmp_path: Path, groups: dict[str, dict[str, float]]
) -> None:
    rows = [Row(k, {"accuracy": v}) for k, v in A.items()]
    summary = Summary({"accuracy": mean_metric([*A.values()], 100)}, {}, groups)
    outputs = [write_output(tmp_path / n, {"quiz": (entry(summary), rows)}) for n in ("a", "b")]
    captions = [e.words for e in Tree(page(compare(outputs, force=False))).all("figcaption")]
    assert len(captions) == 2 and not [each for each in captions if "by group" in each]


def test_twelve_checkpoints_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(12):
        checkpoint(tmp_path / "run" / f"step-{step}", [step, step + 1.0], [step, step + 0.1])
    found = compare([tmp_path / "run"], force=False)
    tree = Tree(page(found))
    assert len(tree.all("circle", "ring")) == 2 * 12
    print_comparison(found)
    assert "headlines; every metric is in --json" in " ".join(capsys.readouterr().out.split())


def test_frontier_rings_the_front_and_names_its_points(tmp_path: Path) -> None:
    for step, reward in ((1, 0.5), (2, 2.0), (3, 1.0)):
        checkpoint(tmp_path / "run" / f"step-{step}", [step, step + 1.0], [reward, reward + 0.1])
    tree = Tree(page(compare([tmp_path / "run"], force=False)))
    for axis in ("KL", "sqrt(KL)"):
        inside = tree.figure(f"signals.reward against {axis}")
        assert len([e for e in inside if "ring" in e.classes]) == 2
        assert len([e for e in inside if "dot" in e.classes]) == 3
        labels = {e.words for e in inside if e.tag in ("text", "p")}
        assert {"step-1", "step-2", "step-3", axis} <= labels


def test_the_headline_of_checkpoints_is_drawn_by_step(tmp_path: Path) -> None:
    """Three checkpoints of a run make a curve; the one alone, and two of another run, do not."""
    rewards = {1: 0.5, 20: 2.0, 3: 1.0}
    for step, reward in rewards.items():
        checkpoint(tmp_path / "long" / f"step-{step}", [step, step + 1.0], [reward, reward + 0.1])
    for step in (1, 2):
        checkpoint(tmp_path / "short" / f"step-{step}", [step, step + 1.0], [step, step + 0.1])
    found = compare([tmp_path / "long", tmp_path / "short"], force=False)
    caption = "reward by step, bars: 95 % intervals (± 1.96 standard errors)"
    inside = Tree(page(found)).figure(caption)
    assert [e.words for e in inside if "key" in e.classes] == ["long"]
    titles = [e.words.split(":")[0] for e in inside if e.tag == "title"]
    assert titles == ["long/step-1", "step-3", "step-20"]
    assert len([e for e in inside if e.tag == "polyline"]) == 1
    assert len([e for e in inside if "bar" in e.classes]) == 3


def test_runs_of_one_folder_name_have_a_curve_each(tmp_path: Path) -> None:
    for run in ("one/run", "two/run"):
        for step in (1, 2, 3):
            checkpoint(tmp_path / run / f"step-{step}", [step, step + 1.0], [step, step + 0.1])
    found = compare([tmp_path / "one" / "run", tmp_path / "two" / "run"], force=False)
    inside = Tree(page(found)).figure(
        "reward by step, bars: 95 % intervals (± 1.96 standard errors)"
    )
    assert [e.words for e in inside if "key" in e.classes] == ["one/run", "two/run"]
    assert [e.classes for e in inside if e.tag == "polyline"] == [["s0"], ["s1"]]


def test_the_same_results_make_the_same_page(tmp_path: Path) -> None:
    outputs = [scored(tmp_path / "a", A), scored(tmp_path / "b", B)]
    assert page(compare(outputs, force=False)) == page(compare(outputs, force=False))
