"""``run.json``: everything needed to say what a run was, and to run it again."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import subprocess
from typing import Any

from prefopt.data import DataBundle
from prefopt.model.load import LoadedPolicy
from prefopt.recipe.schema import Recipe
from prefopt.recipe.walk import recorded
from prefopt.training.draws import label_statistics
from prefopt.training.regimes import OfflineRegime
from prefopt.training.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)

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
        "recipe": recipe.model_dump(mode="json"),
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
    return _leaves(recorded(Recipe, recipe.model_dump(mode="json"), "run"))


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


def warn_about_changes(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Names every setting that differs from the run being continued: it counts from here on."""
    before, after = (
        _leaves(recorded(Recipe, each.get("recipe", {}), "run")) for each in (old, new)
    )
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            logger.warning("resuming with %s = %r (was %r)", key, after.get(key), before.get(key))


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
