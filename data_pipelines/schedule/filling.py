"""Placeholders in pipelines, recipes and evaluations: ``${NAME}`` stands for what an earlier step came to."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError, suggest
from prefopt.recipe.yaml_file import Document, KeyPath
from prefopt.storage.model_files import ADAPTER_CONFIG, read_adapter_config

_PLACEHOLDER = re.compile(r"\$\{([^{}]*)\}")


def filled(
    value: Any, names: Mapping[str, Any], unknown: list[tuple[KeyPath, str]], path: KeyPath = ()
) -> Any:
    """``value`` with its placeholders filled in; one that is all there is to a text keeps its type.

    Args:
        value: YAML, of any depth.
        names: what each placeholder stands for.
        unknown: those that are not among ``names`` are added here, with their key, and left as they are.
        path: key of ``value``.
    """
    if isinstance(value, dict):
        return {key: filled(each, names, unknown, (*path, key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [filled(each, names, unknown, (*path, n)) for n, each in enumerate(value)]
    if not isinstance(value, str):
        return value
    missing = [name for name in _PLACEHOLDER.findall(value) if name not in names]
    unknown += [(path, name) for name in missing]
    if whole := _PLACEHOLDER.fullmatch(value):
        return value if missing else names[whole[1]]
    return _PLACEHOLDER.sub(lambda found: str(names.get(found[1], found[0])), value)


def unknown_problem(
    document: Document, path: KeyPath, name: str, names: Collection[str], steps: Collection[str]
) -> str:
    """What is wrong with a placeholder: its line and key, and what could be meant.

    Args:
        document: that it stands in.
        path: its key.
        name: the unknown name.
        names: what is known where it stands.
        steps: every step of the schedule.
    """
    where = f"{document.origin(path)}{'.'.join(map(str, path))}: ${{{name}}}"
    which, _, rest = name.partition(".")
    if which in ("previous", "best") and rest.removesuffix(".score") in steps:
        return f"{where}: there is none in the first turn of the loop; say under `start` what {rest} is there"
    if name.removesuffix(".score") in steps:
        return (
            f"{where}: has no value yet: a step names the results of steps before it. In a loop, "
            f"${{previous.{name}}} is that of the turn before"
        )
    return f"{where}: unknown placeholder; {suggest(name, names)}"


def with_plugins(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """Plugins are relative to the file they are named in, and the schedule's copy lies elsewhere."""
    if isinstance(raw.get("plugins"), list):
        raw["plugins"] = [str((file.parent / str(each)).resolve()) for each in raw["plugins"]]
    return raw


def set_to_train(raw: dict[str, Any], policy: str, bases: Mapping[str, str]) -> None:
    """Sets a recipe to train ``policy``: an adapter is trained on, a full model gets a new one.

    Args:
        raw: the recipe; it is changed.
        policy: the policy to start from; may be one that is yet to be made.
        bases: the full model below each adapter that is yet to be made.
    """
    base = bases.get(policy) or _base(policy)
    if base is not None and raw.get("peft"):
        raw["peft"] = {"adapter": policy}
        policy = base
    put(raw, "model", path=policy)


def put(raw: dict[str, Any], section: str, **keys: Any) -> None:
    """Sets keys of a section; what is no section is left to be refused."""
    found = raw.get(section) or {}
    if isinstance(found, dict):
        raw[section] = {**found, **keys}


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


def _base(policy: str) -> str | None:
    """The full model below an adapter, None for a policy that is none."""
    if not (Path(policy) / ADAPTER_CONFIG).is_file():
        return None
    base = read_adapter_config(Path(policy)).get("base_model_name_or_path")
    if base is None:
        raise ConfigError(f"{Path(policy) / ADAPTER_CONFIG}: names no base_model_name_or_path")
    return str(base)
