"""A comparison for a terminal: metrics side by side, paired differences, what was dropped or forced."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval.comparison.frontier import Frontier, root
from eval.comparison.paired import Difference
from eval.comparison.tree import Comparison, Pair, TaskComparison, oriented
from eval.comparison.wording import (
    FORCED,
    PERCENT,
    TESTS,
    metric_text,
    number,
    p_text,
    pair_remarks,
    spread_text,
    task_remarks,
)

_MAX_COLUMNS = 5
"""More results than this are rows, with the headlines only."""


def print_comparison(comparison: Comparison) -> None:
    """To standard output."""
    console = Console(highlight=False)
    if comparison.forced:
        console.print(f"[bold red]{FORCED}[/bold red]")
        for mismatch in comparison.forced:
            console.print(f"  {escape(str(mismatch))}", soft_wrap=True)
    few = len(comparison.outputs) <= _MAX_COLUMNS
    console.print(_metrics(comparison) if few else _headlines(comparison))
    console.print(_differences(comparison))
    _print_remarks(console, comparison)
    if comparison.frontier is not None:
        console.print(_frontier(comparison.frontier))


def _metrics(comparison: Comparison) -> Table:
    table = Table(
        title="metrics, ± one standard error or (the benchmark's interval)", box=SIMPLE_HEAD
    )
    table.add_column("task")
    table.add_column("metric", overflow="fold")
    for output in comparison.outputs:
        table.add_column(escape(output.name), justify="right", overflow="fold")
    for task in comparison.tasks:
        names = dict.fromkeys(name for each in task.results.values() for name in each.metrics)
        for index, name in enumerate(names):
            cells = [_cell(task, output.name, name) for output in comparison.outputs]
            mark = " *" if name == task.headline else ""
            table.add_row(_task_name(task) if index == 0 else "", escape(name) + mark, *cells)
        table.add_section()
    return table


def _headlines(comparison: Comparison) -> Table:
    table = Table(title="headlines; every metric is in --json and on the page", box=SIMPLE_HEAD)
    table.add_column("result")
    for task in comparison.tasks:
        table.add_column(
            f"{_task_name(task)}\n{escape(task.headline)}", justify="right", overflow="fold"
        )
    for output in comparison.outputs:
        cells = [_cell(task, output.name, task.headline) for task in comparison.tasks]
        table.add_row(escape(output.name), *cells)
    return table


def _cell(task: TaskComparison, name: str, metric: str) -> str:
    found = task.results[name].metrics.get(metric) if name in task.results else None
    return "–" if found is None else metric_text(found)


def _differences(comparison: Comparison) -> Table:
    table = Table(
        title=f"paired differences, second - first ({PERCENT} bootstrap interval)",
        box=SIMPLE_HEAD,
    )
    table.add_column("second - first", overflow="fold")
    # Room for an interval of percentage points: a number that is cut would be another number.
    table.add_column("difference", justify="right", overflow="fold", min_width=16)
    for column in ("n", "p", "Holm's p", "won/lost/tied"):
        table.add_column(column, justify="right", no_wrap=True)
    for task in comparison.tasks:
        table.add_row(f"[bold]{_task_name(task)}[/bold]")
        for pair in task.pairs:
            names = f"{escape(pair.second)} - {escape(pair.first)}"
            table.add_row(names, *_pair_cells(task, pair))
    return table


def _pair_cells(task: TaskComparison, pair: Pair) -> list[str]:
    difference = pair.difference
    if difference is None:
        return ["–", "0", "–", "–", "–"]
    return [
        spread_text(difference.mean, difference.interval, signed=True),
        f"{difference.n:,}",
        p_text(difference.p_value),
        p_text(pair.p_holm),
        _counts(task, difference),
    ]


def _counts(task: TaskComparison, difference: Difference) -> str:
    counts = [f"{count:,}" for count in oriented(difference, task.direction)]
    marks = ("↑", "↓", "=") if task.direction == "none" else ("", "", "")
    return "/".join(f"{count}{mark}" for count, mark in zip(counts, marks, strict=True))


def _print_remarks(console: Console, comparison: Comparison) -> None:
    lines = []
    for task in comparison.tasks:
        tests = sorted({TESTS[pair.difference.test] for pair in task.pairs if pair.difference})
        if tests:
            lines.append(f"{task.name}: differences in {task.unit}; p of {' and '.join(tests)}")
        lines += [f"{task.name}: {line}" for line in task_remarks(task)]
        lines += [f"{task.name}: {line}" for pair in task.pairs for line in pair_remarks(pair)]
    lines += comparison.remarks
    lines += [f"{task}: only {name} has it" for task, name in comparison.alone.items()]
    for line in lines:
        console.print(escape(line), soft_wrap=True)


def _frontier(found: Frontier) -> Table:
    table = Table(title=f"{found.reward} against KL; * is on the Pareto front", box=SIMPLE_HEAD)
    table.add_column("result")
    for column in ("KL", "sqrt(KL)", found.reward):
        table.add_column(escape(column), justify="right")
    for point in found.points:
        mark = " *" if point.on_front else ""
        square_root = number(root(point.kl).value)
        table.add_row(
            escape(point.name) + mark, metric_text(point.kl), square_root, metric_text(point.reward)
        )
    return table


def _task_name(task: TaskComparison) -> str:
    """Marked wherever it is shown, so that no line can be quoted without the mark."""
    return escape(task.name) + (" [bold red](forced)[/bold red]" if task.forced else "")
