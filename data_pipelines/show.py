"""Pages and tables of ``prefopt data``: made from the schema and the records, nothing is described here."""

from __future__ import annotations

import inspect
import itertools
import json
from typing import Any

from rich.table import Table

from data_pipelines.folder import StageFolder
from data_pipelines.pipeline import Pipeline, presets
from data_pipelines.registry import StageSpec, get_stage, stage_names
from data_pipelines.rows import RowKind
from data_pipelines.runner import status
from prefopt.errors import ConfigError, suggest
from prefopt.recipe.help_pages import schema_page
from prefopt.report.terminal import Terminal
from prefopt.shown import say


def stages_page() -> str:
    """A line or two a stage."""
    return "\n".join(_summary(get_stage(name)) for name in sorted(stage_names()))


def stage_page(name: str) -> str:
    """One stage: what it does and every key. Raises: ConfigError for an unknown name."""
    spec = get_stage(name)
    text = inspect.getdoc(spec.settings) or ""
    keys = schema_page(spec.settings).split("\n", 1)
    return f"{_summary(spec)}\n\n{text}\n\n{keys[1] if len(keys) > 1 else ''}".rstrip()


def presets_page() -> str:
    """A preset a paragraph: its name and the first sentence of its file."""
    return "\n".join(
        f"{name}\n    {_first_sentence(path.read_text(encoding='utf-8'))}"
        for name, path in presets().items()
    )


def preset_page(name: str) -> str:
    """The YAML of a preset, to be read or copied. Raises: ConfigError for an unknown name."""
    known = presets()
    if name not in known:
        raise ConfigError(f"{name!r}: no preset; {suggest(name, known)}")
    return known[name].read_text(encoding="utf-8").rstrip()


def _first_sentence(text: str) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.removeprefix("# ") for line in lines).split(". ")[0].rstrip(".") + "."


def print_record(pipeline: Pipeline) -> None:
    """Rows in and out of each stage, by reason."""
    table = Table(title=str(pipeline.directory))
    for name in ("stage", "in", "out", "rows are", "dropped"):
        table.add_column(name, justify="right" if name in ("in", "out") else "left")
    for id_, record in status(pipeline):
        if record is None:
            table.add_row(id_, "", "", "", _unfinished(pipeline, id_))
            continue
        counts = record["counts"]
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in counts["dropped"].items())
        table.add_row(
            id_, f"{counts['rows_in']:,}", f"{counts['rows_out']:,}", record["gives"], dropped
        )
    console = Terminal()
    console.print(table)
    for id_, record in status(pipeline):
        for name, found in ((record or {}).get("report") or {}).items():
            console.print(_report(f"{id_}: {name}", found))


def _unfinished(pipeline: Pipeline, id_: str) -> str:
    """How far a stage is that is not done: shards that have a record."""
    shards = StageFolder(pipeline.directory, id_).num_recorded()
    return f"not finished: {shards:,} shards made" if shards else "not finished"


def _report(title: str, found: Any) -> Table | str:
    """What a stage reports: a table for entries that are alike (Elo of each model), else one line."""
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        return f"{title}: {json.dumps(found, ensure_ascii=False)}"
    columns = list(dict.fromkeys(key for each in found.values() for key in each))
    table = Table(title=title)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for name, each in found.items():
        values = (each.get(column, "") for column in columns)
        table.add_row(name, *(f"{v:.1f}" if isinstance(v, float) else str(v) for v in values))
    return table


def print_use(pipeline: Pipeline) -> None:
    """How to train on what was built."""
    last = pipeline.stages[-1]
    folder = pipeline.directory / last.id
    if last.gives is RowKind.PAIRS:
        say(f"train on it: data.train.0.path={folder}    look at it: prefopt data card {folder}")
    else:
        say(f"{last.gives} in {folder}")


def _summary(spec: StageSpec) -> str:
    takes = " or ".join(sorted(spec.reads)) or "files"
    gives = {"same": "the same", "either": "what its settings say"}.get(spec.gives, spec.gives)
    first = (inspect.getdoc(spec.settings) or "").splitlines()[0]
    return f"{spec.name}  {takes} -> {gives} ({spec.works}; {spec.source})\n    {first}"
