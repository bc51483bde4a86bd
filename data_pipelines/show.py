"""Pages and tables of ``prefopt data``: made from the schema and the records, nothing is described here."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.table import Table

from data_pipelines.pipeline import Pipeline
from data_pipelines.registry import StageSpec, get_stage, stage_names
from data_pipelines.rows import RowKind
from data_pipelines.runner import status
from prefopt.help_pages import schema_page


def stages_page() -> str:
    """A line or two a stage."""
    return "\n".join(_summary(get_stage(name)) for name in sorted(stage_names()))


def stage_page(name: str) -> str:
    """One stage: what it does and every key. Raises: ConfigError for an unknown name."""
    spec = get_stage(name)
    text = inspect.getdoc(spec.settings) or ""
    keys = schema_page(spec.settings).split("\n", 1)
    return f"{_summary(spec)}\n\n{text}\n\n{keys[1] if len(keys) > 1 else ''}".rstrip()


def print_record(pipeline: Pipeline) -> None:
    """Rows in and out of each stage, by reason."""
    table = Table(title=str(pipeline.directory))
    for name in ("stage", "in", "out", "rows are", "dropped"):
        table.add_column(name, justify="right" if name in ("in", "out") else "left")
    for id_, record in status(pipeline):
        if record is None:
            table.add_row(id_, "", "", "", "not finished")
            continue
        counts = record["counts"]
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in counts["dropped"].items())
        table.add_row(
            id_, f"{counts['rows_in']:,}", f"{counts['rows_out']:,}", record["gives"], dropped
        )
    Console().print(table)


def print_use(pipeline: Pipeline) -> None:
    """How to train on what was built."""
    last = pipeline.stages[-1]
    folder = pipeline.directory / last.id
    if last.gives is RowKind.PAIRS:
        print(f"train on it: data.train.0.path={folder}    look at it: prefopt data card {folder}")
    else:
        print(f"{last.gives} in {folder}")


def _summary(spec: StageSpec) -> str:
    takes = " or ".join(sorted(spec.reads)) or "files"
    gives = {"same": "the same", "either": "what its settings say"}.get(spec.gives, spec.gives)
    first = (inspect.getdoc(spec.settings) or "").splitlines()[0]
    return f"{spec.name}  {takes} -> {gives} ({spec.works}; {spec.source})\n    {first}"
