"""The files of a run directory that others read: where they lie, and their shapes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prefopt.errors import DataError, PrefoptError
from prefopt.storage.reading import load_json, log_rows, reading

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
METRICS_ROW = {"step": int}
"""What every row of it has."""
CHECKPOINTS = "checkpoints"
STATE_FILE = "prefopt.json"
"""Of a checkpoint: written last, so that a checkpoint with it is complete."""

_RUN_KEYS = {"recipe": dict, "recipe.model": dict, "recipe.model.path": str}
_RUN_MAYBE = {
    "recipe.objective": dict, "recipe.peft": dict, "recipe.data": dict, "recipe.data.condition": dict,
    "recipe.model.revision": str, "recipe.model.trust_remote_code": bool, "data": dict,
    "data.labels": dict, "data.labels.rewards": dict,
}  # fmt: skip
_STEP = re.compile(r"step-(0|[1-9]\d*)")


def read_run(run_dir: Path, error: type[PrefoptError] = DataError) -> dict[str, Any]:
    """The record of a run: its ``recipe`` with its ``model``, and what else ``run.json`` says.

    Raises: ``error`` for a record that is not there, torn, edited to another shape, or of something else.
    """
    path = run_dir / RUN_FILE
    advice = "Restore it, or name the run's final/ or a model where it is all that you need"
    with reading(path, "the record of a run", advice, error):
        return load_json(path, _RUN_KEYS, _RUN_MAYBE)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, without a torn last one.

    Raises: DataError naming the line of what is no row.
    """
    advice = "Restore it, or delete that line; a run that goes on mends the file by itself"
    return list(log_rows(path, METRICS_ROW, advice))


def complete_checkpoints(root: Path) -> dict[int, Path]:
    """Complete checkpoints under ``root`` by step, ascending; a copy or an editor's backup is none of them."""
    found = {
        int(match[1]): path
        for path in (root.iterdir() if root.is_dir() else ())
        if (match := _STEP.fullmatch(path.name)) and (path / STATE_FILE).is_file()
    }
    return dict(sorted(found.items()))
