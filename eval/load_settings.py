"""From the command line and a YAML file to `EvalSettings`: every problem at once, with its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.options import has_option
from eval.settings import EvalSettings
from prefopt.errors import ConfigError
from prefopt.recipe.load import load_settings as validated_settings
from prefopt.recipe.yaml_file import Document, apply_overrides, read_yaml


def load_settings(
    config: Path | None,
    overrides: Sequence[str],
    *,
    model: str,
    baseline: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> EvalSettings:
    """The validated settings; what the command line names wins over the file.

    Raises: ConfigError with every problem.
    """
    document = apply_overrides(read_yaml(config) if config else Document({}), overrides)
    raw = dict(document.raw)
    for key, path in (("model", model), ("baseline", baseline)):
        if path is not None:
            section = raw.get(key) or {}
            raw[key] = {**section, "path": path} if isinstance(section, dict) else section
    raw |= {key: value for key, value in (("limit", limit), ("seed", seed)) if value is not None}
    return validated_settings(EvalSettings, replace(document, raw=raw), config)


def score_options(task: str, given: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Options of a task for `prefopt eval score`: ``--calibration``, ``--data`` and ``key=value``.

    ``key`` may be written ``tasks.<task>.key``, as a whole evaluation has it.
    Raises: ConfigError for an option that the task does not take, or that does not parse.
    """
    prefix = f"tasks.{task}."
    document = apply_overrides(Document({}), [item.removeprefix(prefix) for item in overrides])
    problems = list(document.problems)
    options = dict(document.raw)
    for name, value in given.items():
        if value is None:
            continue
        if not has_option(task, name):
            problems.append(f"--{name} = {value!r}: {task} takes none; `prefopt eval list {task}`")
        options[name] = value
    if problems:
        raise ConfigError(problems)
    return options
