"""Runs rounds: data from the newest policy, training on it, the next round; each step a process of its own.

Every step can be repeated: a pipeline goes on at its last shard, a run at its last checkpoint, and what is
done is left alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipelines.folder import MANIFEST
from data_pipelines.manifest import read_record
from data_pipelines.round_settings import Round, RoundsSettings, plan_rounds
from data_pipelines.steps import refuse_changes, run_prefopt, train, write_files
from prefopt.errors import DataError

logger = logging.getLogger("prefopt.data")
_METRICS = ("loss", "rewards/accuracy", "rewards/margin", "eval/rewards/accuracy", "eval/reward")


def run_rounds(settings: RoundsSettings) -> list[dict[str, Any]]:
    """Runs what is not done yet; returns what each round came to.

    Raises: ConfigError for files that cannot work, or that changed since a round ran; TrainingError, DataError
        for a step that failed: the same command goes on there.
    """
    rounds = plan_rounds(settings)
    for each in rounds:
        refuse_changes(each.files, f"round {each.number}", f"{each.folder} and the rounds after it")
    found = []
    for each in rounds:
        logger.info("round %d of %d: %s", each.number, len(rounds), each.policy)
        write_files(each.files)
        if not each.final.is_dir():
            for name, _ in each.pipelines:
                run_prefopt(["data", "build", str(each.file(name))], f"round {each.number}")
            recipe = each.file("recipe")
            train(f"round {each.number}", recipe, each.final, settings.launch, settings.script)
        if settings.eval is not None and not (each.folder / "eval" / "results.json").is_file():
            _evaluate(settings, each)
        found.append(outcome(each))
    return found


def outcome(each: Round) -> dict[str, Any]:
    """Rows by stage, the last logged training metrics and the evaluation of one finished round."""
    data = {}
    for name, raw in each.pipelines:
        record = read_record(Path(raw["output_dir"]) / MANIFEST)
        if record is None:
            raise DataError(f"{raw['output_dir']}: holds no {MANIFEST}; run the same command again")
        data[name] = {stage["id"]: stage["counts"] for stage in record["stages"]}
    metrics: dict[str, Any] = {}
    with (each.run / "metrics.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            metrics |= {key: row[key] for key in _METRICS if key in row}
    return {
        "round": each.number,
        "policy": each.policy,
        "trained": str(each.final),
        "data": data,
        "metrics": metrics,
        "eval": _headlines(each.folder / "eval" / "results.json"),
    }


def print_rounds(found: Sequence[dict[str, Any]]) -> None:
    """A line a round: pairs, training metrics, evaluation."""
    metrics = [name for name in _METRICS if any(name in each["metrics"] for each in found)]
    tasks = sorted({name for each in found for name in each["eval"]})
    table = Table(title="rounds")
    for name in ("round", "pairs", *metrics, *tasks):
        table.add_column(name, justify="right")
    for each in found:
        last = list(list(each["data"].values())[-1].values())[-1]
        cells = [
            f"{each['metrics'][name]:.4g}" if name in each["metrics"] else "" for name in metrics
        ]
        cells += [f"{each['eval'][name]:.2f}" if name in each["eval"] else "" for name in tasks]
        table.add_row(str(each["round"]), f"{last['rows_out']:,}", *cells)
    console = Console()
    console.print(table)
    console.print(f"the newest policy: {found[-1]['trained']}", highlight=False, soft_wrap=True)


def _headlines(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    return {
        f"{name} {task['headline']}": task["metrics"][task["headline"]]["value"]
        for name, task in tasks.items()
        if task["headline"] in task["metrics"]
    }


def _evaluate(settings: RoundsSettings, each: Round) -> None:
    assert settings.eval is not None
    arguments = ["eval", str(each.run), "--tasks", settings.eval.tasks]
    arguments += ["--output", str(each.folder / "eval"), *settings.eval.settings]
    run_prefopt(arguments, f"round {each.number}")
