"""A comparison for a terminal: metrics side by side, paired differences, what was dropped or forced."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from eval.comparison.frontier import Frontier, root
from eval.comparison.tree import Comparison, TaskComparison
from eval.comparison.wording import (
    FORCED,
    PERCENT,
    comparison_remarks,
    metric_cell,
    metric_names,
    metric_text,
    number,
    pair_cells,
    task_remarks,
    tests_text,
)
from prefopt.report.terminal import Terminal

_MAX_COLUMNS = 5
"""More results than this are rows, with the headlines only."""


def print_comparison(comparison: Comparison) -> None:
    """To standard output."""
    console = Terminal()
    if comparison.forced:
        console.print(Text(FORCED, "bold red"))
        for mismatch in comparison.forced:
            console.print(f"  {mismatch!s}", soft_wrap=True)
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
        table.add_column(output.name, justify="right", overflow="fold")
    for task in comparison.tasks:
        for index, name in enumerate(metric_names(task)):
            cells = [metric_cell(task, output.name, name) for output in comparison.outputs]
            mark = " *" if name == task.headline else ""
            table.add_row(_task_name(task) if index == 0 else "", name + mark, *cells)
        table.add_section()
    return table


def _headlines(comparison: Comparison) -> Table:
    table = Table(title="headlines; every metric is in --json and on the page", box=SIMPLE_HEAD)
    table.add_column("result")
    for task in comparison.tasks:
        table.add_column(f"{_task_name(task)}\n{task.headline}", justify="right", overflow="fold")
    for output in comparison.outputs:
        cells = [metric_cell(task, output.name, task.headline) for task in comparison.tasks]
        table.add_row(output.name, *cells)
    return table


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
        name = _task_name(task)
        name.stylize("bold", 0, len(task.name))
        table.add_row(name)
        for pair in task.pairs:
            names = f"{pair.second} - {pair.first}"
            cells = pair_cells(task, pair)
            marks = ("↑", "↓", "=") if task.direction == "none" else ("", "", "")
            counts = "/".join(f"{n}{mark}" for n, mark in zip(cells[4:], marks, strict=True))
            table.add_row(names, *cells[:4], counts)
    return table


def _print_remarks(console: Terminal, comparison: Comparison) -> None:
    lines = []
    for task in comparison.tasks:
        if tests := tests_text(task):
            lines.append(f"{task.name}: differences in {task.unit}; p of {tests}")
        lines += [f"{task.name}: {line}" for line in task_remarks(task)]
    lines += comparison_remarks(comparison)
    for line in lines:
        console.print(line, soft_wrap=True)


def _frontier(found: Frontier) -> Table:
    table = Table(title=f"{found.reward} against KL; * is on the Pareto front", box=SIMPLE_HEAD)
    table.add_column("result")
    for column in ("KL", "sqrt(KL)", found.reward):
        table.add_column(column, justify="right")
    for point in found.points:
        mark = " *" if point.on_front else ""
        square_root = number(root(point.kl).value)
        table.add_row(
            point.name + mark, metric_text(point.kl), square_root, metric_text(point.reward)
        )
    return table


def _task_name(task: TaskComparison) -> Text:
    """Marked wherever it is shown, so that no line can be quoted without the mark."""
    return Text.assemble(task.name, (" (forced)" if task.forced else "", "bold red"))
