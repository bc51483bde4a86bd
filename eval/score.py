"""``prefopt eval score TASK FILE``: the benchmark's numbers from published files, nothing generated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.base import Readable
from eval.options import make_task
from eval.registry import get_task
from eval.results import flat
from prefopt.errors import ConfigError, DataError


def score_file(
    name: str, path: Path, options: Mapping[str, Any], *, model: str | None = None
) -> dict[str, Any]:
    """The result object of a published file: flat for one model, under ``models`` for several.

    Raises: ConfigError for an unknown task or one that reads no files; DataError for a bad file, or a model
        that is not in it.
    """
    spec = get_task(name)
    task: Any = make_task(name, options)
    if not isinstance(task, Readable):
        raise ConfigError(
            f"{name}: reads no published files; run it: prefopt eval MODEL --tasks {name}"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    found = task.read(path)
    if model is not None:
        if model not in found:
            raise DataError(f"{path}: no model {model!r}; it has: {', '.join(sorted(found))}")
        found = {model: found[model]}
    if not found:
        raise DataError(f"{path}: holds no rows")
    head = {"task": name, "version": spec.version, "file": path.name}
    summaries = {each: task.summarise(rows) for each, rows in found.items()}
    if len(summaries) == 1:
        (only, summary), *_ = summaries.items()
        return {**head, **({"model": only} if only else {}), **flat(summary)}
    return {**head, "models": {each: flat(summary) for each, summary in summaries.items()}}


def print_score(result: Mapping[str, Any], *, as_json: bool) -> None:
    """To standard output: one JSON object, or a table for people."""
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    console = Console(highlight=False)
    models = result.get("models") or {result.get("model", ""): result}
    names = list(
        dict.fromkeys(key for each in models.values() for key in each if _is_number(each[key]))
    )
    table = Table(title=f"{result['task']} (version {result['version']}), {result['file']}")
    for column in ("", *models):
        table.add_column(str(column), justify="left" if not column else "right")
    for name in names:
        table.add_row(name, *(_shown(each.get(name)) for each in models.values()))
    console.print(table)
    for note in dict.fromkeys(note for each in models.values() for note in each.get("notes", ())):
        console.print(f"note: {note}", soft_wrap=True)


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or _is_interval(value)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, float) for v in value)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if _is_interval(value):
        return f"{value[0]:.2f} … {value[1]:.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
