"""A task's part of the comparison page: plots, tables, caveats, examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from eval.base import Metric
from eval.comparison.frontier import interval_of
from eval.comparison.markup import Markup, el, table
from eval.comparison.outputs import TaskResult
from eval.comparison.page_examples import examples
from eval.comparison.plots import SERIES, Mark, PlotRow, dot_plot, legend
from eval.comparison.tree import Pair, TaskComparison, oriented
from eval.comparison.wording import (
    PERCENT,
    TESTS,
    metric_text,
    number,
    p_text,
    pair_remarks,
    spread_text,
    task_remarks,
)

_BETTER = {"higher": "higher is better", "lower": "lower is better", "none": "neither is better"}


def anchor(index: int) -> str:
    """Where the page's navigation jumps to."""
    return f"task-{index}"


def forced_mark(task: TaskComparison) -> tuple[Markup, ...]:
    """Beside every mention of a task whose results should not be compared."""
    return (Markup(" "), el("span", "forced", class_="forced")) if task.forced else ()


def task_section(task: TaskComparison, index: int) -> Markup:
    """Everything about one task."""
    names = list(task.results)
    notes = [*task_remarks(task), *(line for pair in task.pairs for line in pair_remarks(pair))]
    return el(
        "section",
        el("h2", task.name, *forced_mark(task), id=anchor(index)),
        el("p", f"Headline: {task.headline}, {_BETTER[task.direction]}.", class_="quiet"),
        _metric_plot(task, task.headline),
        _metric_table(task),
        _other_metrics(task),
        _groups(task, names),
        el("h3", "Paired differences"),
        _pair_table(task),
        el("ul", *(el("li", each) for each in notes)) if notes else "",
        *(each for pair in task.pairs for each in examples(pair, task.direction)),
        _counts(task),
    )


def _metric_plot(task: TaskComparison, name: str) -> Markup:
    """A row a result, with the 95 % interval or the benchmark's own."""
    rows = []
    colours = {result: index for index, result in enumerate(task.results)}
    for result, metric in _having(task.results, name):
        mark = Mark(
            metric.value, interval_of(metric), colours[result], f"{result}: {metric_text(metric)}"
        )
        rows.append(PlotRow(result, metric_text(metric), (mark,)))
    if not rows:
        return el("p", f"{name}: no result has a number", class_="quiet")
    return dot_plot(rows, title=name + _bars([metric for _, metric in _having(task.results, name)]))


def _bars(metrics: Sequence[Metric]) -> str:
    """What the bars of a plot are, for its caption."""
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


def _metric_names(task: TaskComparison) -> list[str]:
    return list(dict.fromkeys(name for each in task.results.values() for name in each.metrics))


def _metric_table(task: TaskComparison) -> Markup:
    rows = [
        [
            name,
            *(
                metric_text(each.metrics[name]) if name in each.metrics else "–"
                for each in task.results.values()
            ),
        ]
        for name in _metric_names(task)
    ]
    return table(["metric (± one standard error)", *task.results], rows)


def _other_metrics(task: TaskComparison) -> Markup:
    others = [name for name in _metric_names(task) if name != task.headline]
    if not others:
        return Markup()
    plots = [_metric_plot(task, name) for name in others]
    return el(
        "details", el("summary", "Plots of the other metrics"), el("div", *plots, class_="two")
    )


def _groups(task: TaskComparison, names: Sequence[str]) -> Markup:
    """The value that most groups have, by group; every other value in a table."""
    found = {name: each.groups for name, each in task.results.items() if each.groups}
    by_group = list(dict.fromkeys(group for groups in found.values() for group in groups))
    value = _group_value(task, by_group)
    if value is None:
        return Markup()
    rows = _group_rows(found, by_group, value, names)
    parts = [el("h3", "By group")]
    if rows and len(names) <= SERIES:  # more could not be told apart
        parts += [legend(names), dot_plot(rows, title=f"{value} by group")]
    folded = el("details", el("summary", "Every number by group"), _group_table(found, by_group))
    return el("div", *parts, folded)


def _group_rows(
    found: Mapping[str, Mapping[str, Mapping[str, float]]],
    groups: Sequence[str],
    value: str,
    names: Sequence[str],
) -> list[PlotRow]:
    """A row a group, a mark a result that has the value there."""
    rows = []
    for group in groups:
        marks = tuple(
            Mark(held, None, index, f"{name}, {group}: {number(held)}")
            for index, name in enumerate(names)
            if (held := found.get(name, {}).get(group, {}).get(value)) is not None
            and math.isfinite(held)
        )
        if marks:
            rows.append(PlotRow(group, " | ".join(number(m.value) for m in marks), marks))
    return rows


def _group_value(task: TaskComparison, groups: Sequence[str]) -> str | None:
    """The headline if groups have it, else the value most of them have; a count if there is no other."""
    counts = Counter(
        name
        for each in task.results.values()
        for group in groups
        for name in each.groups.get(group, {})
    )
    if task.headline in counts:
        return task.headline
    return max(counts, key=lambda name: (name not in ("n", "count"), counts[name]), default=None)


def _group_table(
    found: Mapping[str, Mapping[str, Mapping[str, float]]], groups: Sequence[str]
) -> Markup:
    rows = []
    for group in groups:
        names = dict.fromkeys(name for each in found.values() for name in each.get(group, {}))
        for name in names:
            values = [each.get(group, {}).get(name) for each in found.values()]
            rows.append([group, name, *("–" if v is None else number(v) for v in values)])
    return table(["group", "value", *found], rows, texts=2)


def _pair_table(task: TaskComparison) -> Markup:
    headers = ["second − first", f"difference ({PERCENT} interval)", "n", "p", "p (Holm)"]
    headers += ["higher", "lower", "same"] if task.direction == "none" else ["won", "lost", "tied"]
    tests = sorted({TESTS[pair.difference.test] for pair in task.pairs if pair.difference})
    caption = (
        f"In {task.unit}, of each example's {task.value_name}, paired by key; bootstrap over examples; p of "
        f"{' and '.join(tests)}."
    )
    return el(
        "div",
        el("p", caption, class_="quiet") if tests else "",
        table(headers, [_pair_row(task, pair) for pair in task.pairs]),
    )


def _pair_row(task: TaskComparison, pair: Pair) -> list[str]:
    names, difference = f"{pair.second} − {pair.first}", pair.difference
    if difference is None:
        return [names, "–", "0", *["–"] * 5]
    return [
        names,
        spread_text(difference.mean, difference.interval, signed=True),
        f"{difference.n:,}",
        p_text(difference.p_value),
        p_text(pair.p_holm),
        *(f"{count:,}" for count in oriented(difference, task.direction)),
    ]


def _counts(task: TaskComparison) -> Markup:
    """Every count of every result: nothing is dropped without one."""
    names = dict.fromkeys(name for each in task.results.values() for name in each.counts)
    rows = [
        [name, *(f"{each.counts.get(name, 0):,}" for each in task.results.values())]
        for name in names
    ]
    return el("details", el("summary", "Counts"), table(["count", *task.results], rows))
