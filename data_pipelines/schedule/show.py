"""What came of a schedule: a table with a line a step, and the same as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from data_pipelines.schedule.base import Task
from data_pipelines.schedule.walk import Walk
from prefopt.report.terminal import Terminal
from prefopt.shown import without_credentials
from prefopt.storage.cache import atomic_write

RECORD = "schedule.json"


def write_record(walk: Walk) -> None:
    """Writes ``schedule.json``: every step with its numbers, what each name stands for, loops that ended early."""
    record = {
        "steps": [
            {
                "step": task.settings.name,
                "turns": task.place.turns,
                "values": task.place.values,
                "result": task.settings.result(task),
                "score": found.score,
                "numbers": found.numbers,
            }
            for task, found in walk.found
        ],
        "names": walk.names,
        "ended": walk.ended,
    }
    with atomic_write(walk.schedule.output_dir / RECORD) as temporary:
        text = json.dumps(without_credentials(record), indent=1)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def commands_page(tasks: Sequence[Task]) -> str:
    """A line a step: where it is, whether it is done, what is run."""
    return "\n".join(
        f"{'done' if task.settings.is_done(task) else 'to do'}  {task.title}: "
        f"$ {shlex.join(task.settings.command(task))}"
        for task in tasks
    )


def print_walk(walk: Walk) -> None:
    """A line a step: its turn, its score, its numbers; then what the names of steps stand for."""
    table = Table(title=walk.schedule.title)
    for name in ("turn", "step", "score", "came to"):
        table.add_column(name, justify="right" if name == "score" else "left")
    shown = None
    for task, found in walk.found:
        values = (
            f"{k} {v}" for k, v in task.place.values.items() if not isinstance(v, dict | list)
        )
        turn = ", ".join(filter(None, (task.place.title, *values)))
        score = "" if found.score is None else f"{found.score:.4g}"
        numbers = ", ".join(f"{name} {_shown(value)}" for name, value in found.numbers.items())
        table.add_row("" if turn == shown else turn, task.settings.name, score, numbers)
        shown = turn
    console = Terminal()
    console.print(table)
    steps = {name: walk.names[name] for name in walk.names if name in walk.schedule.names}
    for text in (*walk.ended, *(f"{name}: {value}" for name, value in steps.items())):
        console.print(text, highlight=False, soft_wrap=True)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
