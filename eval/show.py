"""Results for people: a table a model, what was dropped, what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from prefopt.report.terminal import Terminal
from prefopt.shown import say


def print_results(results: Mapping[str, Any], *, as_json: bool) -> None:
    """To standard output: ``results.json`` itself, or a table."""
    if as_json:
        say(json.dumps(results, indent=1, ensure_ascii=False))
        return
    console = Terminal()
    table = Table(title=f"{results['model']['path']}")
    for column, justify in (
        ("task", "left"),
        ("metric", "left"),
        ("value", "right"),
        ("n", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, entry in results["tasks"].items():
        for number, (metric, found) in enumerate(entry["metrics"].items()):
            mark = " *" if metric == entry["headline"] else ""
            count = entry["counts"].get("n", "") if number == 0 else ""
            table.add_row(name if number == 0 else "", f"{metric}{mark}", shown(found), str(count))
    console.print(table)
    for name, entry in results["tasks"].items():
        _print_remarks(console, name, entry)
    if results["limit"]:
        console.print(f"only the first {results['limit']} examples of each task (--limit)")


def shown(metric: Mapping[str, Any]) -> str:
    """``57.30 ± 1.20``, or with an interval ``57.30 (55.1 … 59.2)``."""
    if metric["value"] is None:
        return "–"
    text = f"{metric['value']:.4g}" if abs(metric["value"]) < 1 else f"{metric['value']:.2f}"
    if metric["interval"]:
        return f"{text} ({metric['interval'][0]:.2f} … {metric['interval'][1]:.2f})"
    return text if metric["stderr"] is None else f"{text} ± {metric['stderr']:.2g}"


def _print_remarks(console: Terminal, name: str, entry: Mapping[str, Any]) -> None:
    dropped = {
        key.removeprefix("num_").replace("_", " "): value
        for source in (entry["counts"], entry.get("answers") or {})
        for key, value in source.items()
        if key.startswith("num_") and value and key not in ("num_answers", "num_tokens")
    }
    if dropped:
        console.print(f"{name}: " + ", ".join(f"{value:,} {key}" for key, value in dropped.items()))
    usage = entry.get("usage") or {}
    if usage.get("judge_questions"):
        console.print(
            f"{name}: {usage['judge_questions']:,} judge questions, {usage['judge_prompt_tokens']:,} + "
            f"{usage['judge_completion_tokens']:,} tokens, {usage['usd']:.2f} USD"
        )
    for note in entry["notes"]:
        console.print(f"{name}: {note}", soft_wrap=True)
