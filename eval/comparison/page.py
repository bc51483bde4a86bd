"""The comparison as one HTML file: the charts and rows that its template shows."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from eval.base import Metric
from eval.comparison import wording
from eval.comparison.frontier import Frontier, Point, interval_of, root
from eval.comparison.outputs import TaskResult
from eval.comparison.paired import LEVEL
from eval.comparison.tree import Comparison, TaskComparison, win_words
from eval.comparison.wording import metric_text, number, p_text, spread_text
from prefopt.report import charts
from prefopt.report.charts import SERIES, Line, Mark, Row
from prefopt.report.pages import render

_TEMPLATE = Path(__file__).with_name("comparison.html.j2")


def page(comparison: Comparison) -> str:
    """The page's HTML."""
    shown = (
        fact_lines, forest, frontier_chart, frontier_rows, group_chart, group_rows, count_rows, made_of_results,
        made_of_task, metric_chart, metric_rows, model_text, pair_rows, step_chart, win_words,
    )  # fmt: skip
    named = {each.__name__: each for each in shown}
    return render(_TEMPLATE, comparison=comparison, words=wording, **named)


def model_text(head: Mapping[str, Any]) -> str:
    """Which model a result is of."""
    model = head.get("model") or {}
    adapters = f" with {', '.join(model['adapters'])}" if model.get("adapters") else ""
    return f"{model.get('path', 'model unknown')}{adapters}"


# -- paired differences --------------------------------------------------------------------------------------


def forest(comparison: Comparison) -> list[Markup]:
    """All paired differences, those of one unit on one axis; filled where Holm's p is below 0.05."""
    made = []
    for unit in dict.fromkeys(task.unit for task in comparison.tasks):
        rows = [row for task in comparison.tasks if task.unit == unit for row in _forest_rows(task)]
        if rows:
            made.append(charts.dots(rows, title=f"Second − first, in {unit}", zero=True))
    return made


def _forest_rows(task: TaskComparison) -> Iterator[Row]:
    names = list(task.results)
    better = {"higher": "", "lower": ", lower is better", "none": ", neither is better"}
    for pair in task.pairs:
        found = pair.difference
        if found is None or pair.p_holm is None:
            continue
        numbers = spread_text(found.mean, found.interval, signed=True)
        forced = ", forced" if task.forced else ""
        label = f"{task.name}{forced}: {pair.second} − {pair.first}{better[task.direction]}"
        title = f"{label}: {numbers}, p = {p_text(pair.p_holm)} (Holm)"
        hollow = pair.p_holm >= 1 - LEVEL
        mark = Mark(found.mean, found.interval, names.index(pair.second), title, hollow)
        yield Row(label, numbers, (mark,))


def pair_rows(task: TaskComparison) -> list[list[str]]:
    """A row a pair."""
    return [[f"{p.second} − {p.first}", *wording.pair_cells(task, p)] for p in task.pairs]


# -- a task's numbers ----------------------------------------------------------------------------------------


def metric_chart(task: TaskComparison, name: str) -> Markup:
    """A row a result, with the 95 % interval or the benchmark's own."""
    colours = {result: index for index, result in enumerate(task.results)}
    found = dict(_having(task.results, name))
    if not found:
        return Markup('<p class="quiet">{}: no result has a number</p>').format(name)
    rows = []
    for result, metric in found.items():
        words = metric_text(metric)
        mark = Mark(metric.value, interval_of(metric), colours[result], f"{result}: {words}")
        rows.append(Row(result, words, (mark,)))
    return charts.dots(rows, title=name + _bars(found.values()))


def step_chart(comparison: Comparison, task: TaskComparison) -> Markup | str:
    """The headline by step, a line a run; nothing where no run has three checkpoints."""
    found = dict(_having(task.results, task.headline))
    runs: dict[str, list[tuple[int, str, Metric]]] = {}
    for output in sorted(comparison.outputs, key=lambda output: output.step or 0):
        if output.step is not None and output.name in found:
            runs.setdefault(output.run, []).append((output.step, output.name, found[output.name]))
    curves = {run: curve for run, curve in runs.items() if len(curve) > 2}
    points = [
        charts.Point(
            step, metric.value, "", series, y_interval=interval_of(metric), title=f"{name}: {metric_text(metric)}"
        )
        for series, curve in enumerate(curves.values())
        for step, name, metric in curve
    ]  # fmt: skip
    if not points:
        return ""
    lines = [
        Line(tuple((step, metric.value) for step, _, metric in curve), series)
        for series, curve in enumerate(curves.values())
    ]
    # The names of two runs' checkpoints are long enough to tell the runs apart; of one run, ``step-100``.
    names = [curve[0][1].rpartition("/")[0] or Path(run).name for run, curve in curves.items()]
    title = f"{task.headline} by step{_bars(found.values())}"
    return charts.xy(
        points, lines, title=title, x_label="step", y_label=task.headline, series=names
    )


def _bars(metrics: Iterable[Metric]) -> str:
    """What the bars of a chart are, for its caption."""
    if any(metric.interval for metric in metrics):
        return ", bars: the benchmark's intervals"
    drawn = any(metric.stderr is not None for metric in metrics)
    return ", bars: 95 % intervals (± 1.96 standard errors)" if drawn else ""


def _having(results: Mapping[str, TaskResult], name: str) -> list[tuple[str, Metric]]:
    """The results that have a number of that name."""
    return [
        (result, metric)
        for result, each in results.items()
        if (metric := each.metrics.get(name)) is not None and math.isfinite(metric.value)
    ]


def metric_rows(task: TaskComparison) -> list[list[str]]:
    """A row a metric, a column a result."""
    return [
        [name, *(wording.metric_cell(task, result, name) for result in task.results)]
        for name in wording.metric_names(task)
    ]


def count_rows(task: TaskComparison) -> list[list[str]]:
    """Every count of every result: nothing is dropped without one."""
    counts = [each.counts for each in task.results.values()]
    names = dict.fromkeys(name for each in counts for name in each)
    return [[name, *(f"{each.get(name, 0):,}" for each in counts)] for name in names]


# -- by group ------------------------------------------------------------------------------------------------


def group_rows(task: TaskComparison) -> list[list[str]]:
    """A row a value of a group, a column a result that has groups."""
    found = [each.groups for each in task.results.values()]
    rows = []
    for group in dict.fromkeys(group for groups in found for group in groups):
        for name in dict.fromkeys(name for each in found for name in each.get(group, {})):
            values = [each.get(group, {}).get(name) for each in found]
            rows.append([group, name, *("–" if v is None else number(v) for v in values)])
    return rows


def group_chart(task: TaskComparison) -> Markup | str:
    """The value that most groups have, a row a group, a mark a result; nothing for more than have a colour."""
    value, rows = _group_value(task), []
    for group in dict.fromkeys(group for each in task.results.values() for group in each.groups):
        marks = tuple(
            Mark(held, None, index, f"{name}, {group}: {number(held)}")
            for index, (name, result) in enumerate(task.results.items())
            if (held := result.groups.get(group, {}).get(value)) is not None and math.isfinite(held)
        )
        if marks:
            rows.append(Row(group, " | ".join(number(m.value) for m in marks), marks))
    if not rows or len(task.results) > SERIES:
        return ""
    return charts.dots(rows, title=f"{value} by group", series=list(task.results))


def _group_value(task: TaskComparison) -> str:
    """The headline if groups have it, else the value most of them have; a count if there is no other."""
    groups = [values for each in task.results.values() for values in each.groups.values()]
    counts = Counter(name for values in groups for name in values)
    if task.headline in counts:
        return task.headline
    return max(counts, key=lambda name: (name not in ("n", "count"), counts[name]), default="")


# -- the frontier --------------------------------------------------------------------------------------------


def frontier_chart(found: Frontier, x_label: str) -> Markup:
    """Reward against ``KL`` or its root: error bars both ways, the front ringed, checkpoints of a run joined."""

    def x(point: Point) -> Metric:
        return point.kl if x_label == "KL" else root(point.kl)

    def line(points: Iterable[Point], series: int | None) -> Line:
        return Line(tuple((x(p).value, p.reward.value) for p in points), series)

    runs = list(dict.fromkeys(point.run for point in found.points))
    points = [
        charts.Point(
            x(point).value, point.reward.value, point.name, runs.index(point.run), interval_of(x(point)),
            interval_of(point.reward), point.on_front, point.name,
        )
        for point in found.points
    ]  # fmt: skip
    lines = []
    for series, run in enumerate(runs):
        steps = [point for point in found.points if point.run == run and point.step is not None]
        if len(steps) > 1:
            lines.append(line(sorted(steps, key=lambda point: point.step or 0), series))
    front = sorted((p for p in found.points if p.on_front), key=lambda p: x(p).value)
    lines += [line(front, None)] if len(front) > 1 else []
    title = f"{found.reward} against {x_label}"
    return charts.xy(points, lines, title=title, x_label=x_label, y_label=found.reward, x_zero=True)


def frontier_rows(found: Frontier) -> list[list[str]]:
    """A row a result."""
    return [
        [f"{p.name}{' *' if p.on_front else ''}", metric_text(p.kl), metric_text(p.reward)]
        for p in found.points
    ]


# -- what it was made with, and examples ---------------------------------------------------------------------


def made_of_results(comparison: Comparison) -> list[list[str]]:
    """What each whole result was made with: a key, and its value in each."""
    return _facts([_flat(output.head) for output in comparison.outputs])


def made_of_task(task: TaskComparison) -> list[list[str]]:
    """What one task's results were made with."""
    results = task.results.values()
    return _facts([{"version": r.version, "kind": r.kind, **_flat(r.made)} for r in results])


def _facts(facts: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """A row a key; what differs from the first result is marked."""
    other = Markup('<span class="warn">{}</span>')
    rows = []
    for key in dict.fromkeys(key for each in facts for key in each):
        first, *rest = (each.get(key, "–") for each in facts)
        rows.append([key, first, *(v if v == first else other.format(v) for v in rest)])
    return rows


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"engine.name": "vllm"}``; lists as JSON."""
    found: dict[str, str] = {}
    for key, each in value.items():
        if isinstance(each, Mapping) and each:
            found |= _flat(each, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _written(each)
    return found


def fact_lines(facts: Mapping[str, Any]) -> str:
    """``name: value`` lines; verdicts and judges' words are among an example's details."""
    return "\n".join(f"{name}: {_written(value)}" for name, value in facts.items())


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
