"""``prefopt eval score TASK FILE``: the benchmark's numbers from published files, nothing generated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.base import Readable, ReadModels
from eval.registry import TaskSpec, get_task, make_task
from eval.results import flat
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.thinking import DEFAULT_TAGS, Tags, tags_of
from prefopt.report.terminal import Terminal
from prefopt.shown import say

_MOST_COLUMNS, _MOST_METRICS = 3, 2


def score_file(
    name: str, path: Path, options: Mapping[str, Any], *, model: str | None = None
) -> dict[str, Any]:
    """The result object of a published file: flat for one model, under ``models`` for several.

    Raises: ConfigError for an unknown task or one that reads no files; DataError for a bad file, or a model
        that is not in it.
    """
    spec = get_task(name)
    own, tags = _split_thinking(spec, options)
    task: Any = make_task(name, own)
    if not isinstance(task, Readable):
        raise ConfigError(
            f"{name}: reads no published files; run it: prefopt eval MODEL --tasks {name}"
        )
    if not path.is_file():
        raise DataError(
            f"{path}: {'is a directory' if path.is_dir() else 'no such file'}; give one file"
        )
    further = (tags,) if _reads_responses(spec) else ()
    found = task.read(path, *further)
    if model is not None:
        if model not in found:
            raise DataError(f"{path}: no model {model!r}; it has: {', '.join(sorted(found))}")
        if isinstance(found, ReadModels) and model in found.broken:
            raise found.broken[model]
        found = {model: found[model]}
    elif isinstance(found, ReadModels) and found.broken:
        raise _first_broken(found)
    if not found:
        raise DataError(f"{path}: holds no rows")
    head = {"task": name, "version": spec.version, "file": path.name}
    summaries = {each: task.summarise(rows) for each, rows in found.items()}
    if len(summaries) == 1:
        (only, summary), *_ = summaries.items()
        return {**head, **({"model": only} if only else {}), **flat(summary)}
    return {**head, "models": {each: flat(summary) for each, summary in summaries.items()}}


def _first_broken(found: ReadModels) -> DataError:
    """What is wrong with one model, and which others can be scored alone."""
    error = next(iter(found.broken.values()))
    whole = [name for name in found if name not in found.broken]
    if not whole:
        return error
    shown = ", ".join(f"--model {name}" for name in whole[:5]) + (", …" if len(whole) > 5 else "")
    return DataError(f"{error}. The others can be scored alone: {shown}")


def _reads_responses(spec: TaskSpec) -> bool:
    """Does it score responses in files, and not what judges said of them?"""
    return spec.kind == "generate" and not spec.whole_responses


def _split_thinking(spec: TaskSpec, options: Mapping[str, Any]) -> tuple[dict[str, Any], Tags]:
    """The task's own options, and the marks of thinking that ``thinking`` names, as a whole evaluation has it."""
    own = dict(options)
    if "thinking" not in own:
        return own, DEFAULT_TAGS
    value = own.pop("thinking")
    if not _reads_responses(spec):
        raise ConfigError(
            f"thinking = {value!r}: would be ignored: what {spec.name} reads from files holds no responses. Leave "
            "it out"
        )
    try:
        return own, tags_of(value)
    except ValueError as error:
        raise ConfigError(f"thinking = {value!r}: {error}") from error


def print_score(result: Mapping[str, Any], *, as_json: bool) -> None:
    """To standard output: one JSON object, or a table for people."""
    if as_json:
        say(json.dumps(result, indent=1, ensure_ascii=False))
        return
    console = Terminal()
    models = result.get("models") or {result.get("model", ""): result}
    cells = {str(name): _cells(each) for name, each in models.items()}
    names = list(dict.fromkeys(name for each in cells.values() for name in each))
    title = f"{result['task']} (version {result['version']}), {result['file']}"
    console.print(
        _metrics_down(title, cells, names)
        if len(cells) <= _MOST_COLUMNS
        else _models_down(title, cells, names)
    )
    for note in dict.fromkeys(note for each in models.values() for note in each.get("notes", ())):
        console.print(f"note: {note}", soft_wrap=True)


def _metrics_down(title: str, cells: Mapping[str, Mapping[str, str]], names: list[str]) -> Table:
    table = Table("", title=title)
    for model in cells:
        table.add_column(model, justify="right")
    for name in names:
        table.add_row(name, *(each.get(name, "–") for each in cells.values()))
    return table


def _models_down(title: str, cells: Mapping[str, Mapping[str, str]], names: list[str]) -> Table:
    """Many models: a line each, with the first metrics and the number of examples."""
    shown = [*names[:_MOST_METRICS], *(["n"] if "n" in names[_MOST_METRICS:] else [])]
    table = Table("", title=title)
    for name in shown:
        table.add_column(name, justify="right")
    for model, each in cells.items():
        table.add_row(model, *(each.get(name, "–") for name in shown))
    return table


def _cells(result: Mapping[str, Any]) -> dict[str, str]:
    """``{metric: "57.30 ± 1.20"}``: a metric's standard error or interval stands beside it."""
    found = {}
    for name, value in result.items():
        if not _is_number(value) or name.endswith(("_standard_error", "_interval")):
            continue
        interval, stderr = result.get(f"{name}_interval"), result.get(f"{name}_standard_error")
        text = f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
        if interval:
            text += f" ({interval[0]:.2f} … {interval[1]:.2f})"
        elif stderr is not None:
            text += f" ± {stderr:.2f}"
        found[name] = text
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
