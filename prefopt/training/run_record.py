"""``run.json``: everything needed to say what a run was, and to run it again."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from prefopt.data import DataBundle
from prefopt.model.load import LoadedPolicy
from prefopt.recipe.run_directory import differences, plugin_code
from prefopt.recipe.schema import Recipe
from prefopt.recipe.walk import recorded
from prefopt.shown import without_credentials
from prefopt.storage.cache import atomic_write
from prefopt.storage.run_files import RUN_FILE
from prefopt.training.checkpoint import writing
from prefopt.training.draws import label_statistics
from prefopt.training.regimes import OfflineRegime
from prefopt.training.start import Start
from prefopt.training.trainer import PreferenceTrainer

_PACKAGES = (
    "prefopt",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
)


def describe_run(
    recipe: Recipe, data: DataBundle, policy: LoadedPolicy, trainer: PreferenceTrainer
) -> dict[str, Any]:
    """The run record: resolved recipe, versions, git commit, hashes of weights, data and data order."""
    accelerator = trainer.accelerator
    return {
        "recipe": without_credentials(recipe.model_dump(mode="json")),
        "plugin_code": plugin_code(recipe),
        "objective": {
            "params": dict(trainer.objective.params),
            "source": trainer.objective.spec.source,
        },
        "weights": {"hash": policy.weights_hash, "description": policy.description},
        "data": {
            "train_rows": len(data.train) if data.train is not None else 0,
            "eval_rows": len(data.eval) if data.eval is not None else 0,
            "prompts": len(data.prompts) if data.prompts is not None else 0,
            "train_hash": data.train.fingerprint if data.train is not None else None,
            "prompts_hash": data.prompts.fingerprint if data.prompts is not None else None,
            "order_hash": trainer.regime.order_hash,
            "rejects": dict(data.reject_counts),
            "end_token_ids": list(data.end_ids),
            **_samples(data, trainer),
        },
        "steps": trainer.regime.num_steps,
        "layout": "packed" if trainer.limits.packed else "padded",
        "processes": accelerator.num_processes,
        "distributed": str(accelerator.distributed_type).rsplit(".", 1)[-1],
        "device": str(accelerator.device),
        "versions": versions(),
        "git": git_commit(),
    }


def _samples(data: DataBundle, trainer: PreferenceTrainer) -> dict[str, Any]:
    """Of a run on weighted samples: their labels, how rewards were scaled, and how rows are drawn."""
    regime = trainer.regime
    if data.train is None or not trainer.objective.reads_samples:
        return {}
    found: dict[str, Any] = {
        "labels": label_statistics(data.train),
        "rewards_scaled": data.scaling.describe(),
    }
    if isinstance(regime, OfflineRegime):
        draw = regime.draw
        found["sampling"] = {"name": "uniform"} if draw is None else draw.describe()
    return found


def settings_that_count(recipe: Recipe) -> dict[str, Any]:
    """The recipe's settings that decide what a run computes, as a flat mapping."""
    dump = without_credentials(recipe.model_dump(mode="json"))
    return _leaves(recorded(Recipe, dump, "run"))


def versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on, and Python's."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the working directory, with ``+changes`` if it has any; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def with_history(record: dict[str, Any], start: Start, step: int) -> dict[str, Any]:
    """The record with what was otherwise before ``step``, beneath what stood there already."""
    before = start.before or start.record or {}
    history = list(before.get("history") or [])
    changed = [
        *differences(before.get("recipe", {}), record["recipe"], Recipe),
        *differences(_facts(before), _facts(record)),
    ]
    begun_elsewhere = start.before is None and start.record is not None
    if before and (changed or begun_elsewhere):
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"step": step, "at": now, "changed": [each.as_json() for each in changed]}
        if start.resume_from is not None and begun_elsewhere:
            entry["from"] = str(start.resume_from)
        history.append(entry)
    return {**record, "history": history} if history else record


def write_record(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json, whole or not at all. Raises: TrainingError for a full disk."""
    with writing(run_dir), atomic_write(run_dir / RUN_FILE) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Opens the trackers that the recipe names, with its settings."""
    if not recipe.run.trackers:
        return
    name = recipe.run.name or Path(recipe.run.output_dir).name
    settings = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in _leaves(without_credentials(recipe.model_dump())).items()
    }
    accelerator.init_trackers("prefopt", settings, init_kwargs={"wandb": {"name": name}})


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What it says beside the settings."""
    beside = ("recipe", "history", "finished")
    return {key: value for key, value in record.items() if key not in beside}


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in _leaves(item, f"{prefix}{key}.").items()
        }
    return {prefix.removesuffix("."): value}
