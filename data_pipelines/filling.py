"""Placeholders in pipelines and recipes, and a recipe set to train on from a policy that a schedule has made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import ConfigError, suggest

_ADAPTER_CONFIG = "adapter_config.json"


def filled(value: Any, values: Mapping[str, Any], source: str) -> Any:
    """``value`` with its placeholders filled in; one that is all there is to a text keeps its type.

    Raises: ConfigError naming the nearest for one that is not in ``values``.
    """
    if isinstance(value, dict):
        return {key: filled(item, values, source) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, values, source) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    for name, replacement in values.items():
        if value == f"${{{name}}}":
            return replacement
        value = value.replace(f"${{{name}}}", str(replacement))
    if "${" in value:
        unknown = value.partition("${")[2].partition("}")[0]
        raise ConfigError(
            f"${{{unknown}}}: unknown placeholder; {suggest(unknown, values)}", source=source
        )
    return value


def with_plugins(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """Plugins are relative to the file they are named in, and the schedule's copy lies elsewhere."""
    if isinstance(raw.get("plugins"), list):
        raw["plugins"] = [str((file.parent / str(each)).resolve()) for each in raw["plugins"]]
    return raw


def set_to_train(raw: dict[str, Any], trained: str, first: str, output_dir: Path) -> dict[str, Any]:
    """A recipe set to train ``trained``: an adapter is trained on, a full model gets a new one.

    Args:
        raw: the recipe; it is changed.
        trained: the policy to start from; may be one that is yet to be made.
        first: the policy that the schedule began with.
        output_dir: of the run.
    """
    is_adapter = _is_adapter(trained) or (trained != first and bool(raw.get("peft")))
    model = dict(raw.get("model") or {})
    if is_adapter and raw.get("peft"):
        model["path"] = _base(first)
        raw["peft"] = {"adapter": trained}
    else:
        model["path"] = trained
    raw["model"] = model
    raw["run"] = {**(raw.get("run") or {}), "output_dir": str(output_dir)}
    return raw


def final_policy(path: str) -> str:
    """What a run ended with, for a run directory; any other path as it is. Raises: ConfigError if it has not."""
    directory = Path(path).expanduser()
    if not (directory / "run.json").is_file():
        return path
    if not (directory / "final").is_dir():
        raise ConfigError(
            f"policy = {path!r}: a run that has not ended: it holds no final/. Finish it first"
        )
    return str(directory / "final")


def dump(raw: Mapping[str, Any]) -> str:
    """YAML of a resolved pipeline or recipe."""
    return yaml.safe_dump(dict(raw), sort_keys=False, allow_unicode=True)


def _is_adapter(path: str) -> bool:
    return (Path(path) / _ADAPTER_CONFIG).is_file()


def _base(policy: str) -> str:
    """The full model below the first policy."""
    if not _is_adapter(policy):
        return policy
    text = (Path(policy) / _ADAPTER_CONFIG).read_text(encoding="utf-8")
    return str(json.loads(text)["base_model_name_or_path"])
