"""Output directories as `prefopt eval` leaves them, from rows that tests make or read from published files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.base import Metric, Row, Summary
from eval.results import metrics_json
from eval.statistics import mean_metric

HEAD: dict[str, Any] = {
    "format": 1,
    "model": {"path": "models/tiny", "hash": "a" * 64, "adapters": []},
    "baseline": None,
    "engine": {"name": "hf", "dtype": "float32", "options": {}},
    "judge": None,
    "seed": 0,
    "limit": None,
}
MADE: dict[str, Any] = {
    "data_hash": "d" * 64,
    "decoding": [{"temperature": 0.0, "max_new_tokens": 64, "examples": 3}],
    "decoding_hash": "e" * 64,
    "chat_template_hash": "c" * 64,
    "template": None,
    "baseline": None,
    "options": {},
    "usage": {},
}


def entry(
    summary: Summary,
    *,
    version: str = "1",
    kind: str = "generate",
    direction: str = "higher",
    headline: str | None = None,
    **made: Any,
) -> dict[str, Any]:
    """A task's entry of ``results.json``; the first metric is the headline unless told otherwise."""
    return {
        "version": version,
        "kind": kind,
        "headline": headline or next(iter(summary.metrics)),
        "direction": direction,
        **metrics_json(summary),
        **MADE,
        **made,
    }


def write_output(
    directory: Path,
    tasks: Mapping[str, tuple[dict[str, Any], Sequence[Row]]],
    texts: Mapping[str, tuple[str, str]] | None = None,
    **head: Any,
) -> Path:
    """An output directory; ``texts``: prompt and answer by key, where a test reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = {name: each for name, (each, _) in tasks.items()}
    results = {**HEAD, **head, "tasks": entries, "versions": {"torch": "2.13.0"}}
    (directory / "results.json").write_text(json.dumps(results), encoding="utf-8")
    for name, (_, rows) in tasks.items():
        lines = [_line(row, *(texts or {}).get(row.key, ("", ""))) for row in rows]
        folder = directory / name.replace(":", "_")
        folder.mkdir(exist_ok=True)
        (folder / "examples.jsonl").write_text("".join(lines), encoding="utf-8")
    return directory


def _line(row: Row, prompt: str, answer: str) -> str:
    line = {
        "key": row.key,
        "values": dict(row.values),
        "details": dict(row.details),
        "problem": row.problem,
        "prompt": prompt,
        "answer": answer,
    }
    return json.dumps(line) + "\n"


def scored(
    directory: Path,
    values: Mapping[str, float | None],
    *,
    task: str = "quiz",
    scale: float = 100,
    texts: Mapping[str, tuple[str, str]] | None = None,
    head: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
    **made: Any,
) -> Path:
    """An output directory with one task whose headline ``accuracy`` is the mean of these values by key."""
    rows = [Row(key, {"accuracy": value}, details or {}) for key, value in values.items()]
    found = [value for value in values.values() if value is not None]
    metric = mean_metric(found, scale) if found else Metric(0.0)
    summary = Summary({"accuracy": metric}, {"n": len(rows)})
    return write_output(directory, {task: (entry(summary, **made), rows)}, texts, **(head or {}))


# Right and wrong answers of two models to the same five questions.
A = {"k1": 0.0, "k2": 1.0, "k3": 0.0, "k4": 1.0, "k5": 0.0}
B = {"k1": 1.0, "k2": 1.0, "k3": 1.0, "k4": 0.0, "k5": 1.0}


def checkpoint(
    directory: Path, kl: list[float], reward: list[float], reward_task: str = "signals"
) -> Path:
    """A result with a KL and a reward, each the mean over two examples."""
    metric = "reward" if reward_task == "signals" else "win_rate"
    numbers = {"kl": ("kl", kl, "none"), reward_task: (metric, reward, "higher")}
    tasks = {}
    for task, (name, values, direction) in numbers.items():
        summary = Summary({name: mean_metric(values)}, {"n": len(values)})
        rows = [Row(f"k{n}", {name: value}) for n, value in enumerate(values)]
        tasks[task] = (entry(summary, direction=direction), rows)
    return write_output(directory, tasks)
