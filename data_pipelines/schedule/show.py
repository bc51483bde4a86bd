"""What came of a schedule: a table with a line a turn, and the same as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipelines.schedule.base import Task
from data_pipelines.schedule.walk import Walk
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
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def commands_page(tasks: Sequence[Task]) -> str:
    """A line a step: where it is, whether it is done, what is run."""
    return "\n".join(
        f"{'done' if task.settings.is_done(task) else 'to do'}  {task.title}: "
        f"$ {shlex.join(task.settings.command(task))}"
        for task in tasks
    )


def print_walk(walk: Walk) -> None:
    """A line a turn: its numbers and values, and what each of its steps came to; then what the names stand for."""
    lines: dict[str, dict[str, Any]] = {}
    for task, found in walk.found:
        line = lines.setdefault(str(task.place.folder), {})
        line |= task.place.turns
        line |= {k: v for k, v in task.place.values.items() if not isinstance(v, dict | list)}
        line |= _cells(task.settings.name, found.numbers, found.score)
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    table = Table(title=walk.schedule.title)
    for name in columns:
        table.add_column(name, justify="right")
    for line in lines.values():
        table.add_row(*(_shown(line[name]) if name in line else "" for name in columns))
    console = Console()
    console.print(table)
    steps = {name: walk.names[name] for name in walk.names if name in walk.schedule.names}
    for text in (*walk.ended, *(f"{name}: {value}" for name, value in steps.items())):
        console.print(text, highlight=False, soft_wrap=True)


def _cells(step: str, numbers: Mapping[str, Any], score: float | None) -> dict[str, Any]:
    scored = {} if score is None or score in numbers.values() else {"score": score}
    return {f"{step}: {name}": value for name, value in {**numbers, **scored}.items()}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
