"""Runs rounds: data from the newest policy, training on it, the next round; each step a process of its own.

Separate processes, because a policy in vLLM and one in training do not fit one GPU, and nothing gives memory
back as surely as the end of a process. Every step can be repeated: a pipeline goes on at its last shard, a
run at its last checkpoint, and what is done is left alone.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from data_pipelines.folder import MANIFEST
from data_pipelines.manifest import changes, read_record
from data_pipelines.round_settings import Round, RoundsSettings, dump, plan_rounds
from prefopt.cache import atomic_write
from prefopt.engines.child import GuardedProcess, describe_exit
from prefopt.errors import ConfigError, DataError, TrainingError

logger = logging.getLogger("prefopt.data")
_POLL_S = 0.2
_GRACE_S = 600.0
"""Time a step has to write a checkpoint after Ctrl-C."""
_METRICS = ("loss", "rewards/accuracy", "rewards/margin", "eval/rewards/accuracy", "eval/reward")


def run_rounds(settings: RoundsSettings) -> list[dict[str, Any]]:
    """Runs what is not done yet; returns what each round came to.

    Raises: ConfigError for files that cannot work, or that changed since a round ran; TrainingError, DataError
        for a step that failed: the same command goes on there.
    """
    rounds = plan_rounds(settings)
    for each in rounds:
        _refuse_changes(each)
    found = []
    for each in rounds:
        logger.info("round %d of %d: %s", each.number, len(rounds), each.policy)
        _write_files(each)
        if not each.final.is_dir():
            for name, _ in each.pipelines:
                _run(["-m", "prefopt.cli", "data", "build", str(each.file(name))], each)
            _train(settings, each)
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


def _files(each: Round) -> list[tuple[Path, dict[str, Any]]]:
    files = [(each.file(name), raw) for name, raw in each.pipelines]
    return [*files, (each.file("recipe"), each.recipe)]


def _refuse_changes(each: Round) -> None:
    """Raises ConfigError if a round that has begun would now be another one."""
    problems = []
    for path, raw in _files(each):
        if path.is_file():
            was = yaml.safe_load(path.read_text(encoding="utf-8"))
            problems += [
                f"round {each.number} has begun with another {path.name}: {change}. Put it back, or take another "
                f"output_dir, or delete {each.folder} and the rounds after it to make them again"
                for change in changes(was, json.loads(json.dumps(raw)))
            ]
    if problems:
        raise ConfigError(problems)


def _write_files(each: Round) -> None:
    for path, raw in _files(each):
        with atomic_write(path) as temporary:
            temporary.write_text(dump(raw), encoding="utf-8")


def _train(settings: RoundsSettings, each: Round) -> None:
    recipe = str(each.file("recipe"))
    if settings.launch:
        _run([*shlex.split(settings.launch), str(settings.script), recipe], each, python=False)
    else:
        _run(["-m", "prefopt.cli", "train", recipe], each)
    if not each.final.is_dir():
        raise TrainingError(
            f"round {each.number}: training ended without {each.final}; run the same command again"
        )


def _evaluate(settings: RoundsSettings, each: Round) -> None:
    assert settings.eval is not None
    arguments = ["eval", str(each.run), "--tasks", settings.eval.tasks]
    arguments += ["--output", str(each.folder / "eval"), *settings.eval.settings]
    _run(["-m", "prefopt.cli", *arguments], each)


def _run(command: Sequence[str], each: Round, *, python: bool = True) -> None:
    """Runs a step to its end; it ends with this process, however this one ends. Raises: TrainingError."""
    whole = [sys.executable, *command] if python else list(command)
    shown = "prefopt " + shlex.join(command[2:]) if python else shlex.join(command)
    logger.info("$ %s", shown)
    process = GuardedProcess(whole, os.environ, None)
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
        code = process.poll()
    except KeyboardInterrupt:
        process.stop(_GRACE_S)
        raise
    finally:
        process.stop(0)
    if code:
        raise TrainingError(
            f"round {each.number}: {shown}: {describe_exit(code)}; see what it said above. What is done stays "
            "done: run the same command again"
        )
