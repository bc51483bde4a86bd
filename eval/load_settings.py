"""From the command line and a YAML file to `EvalSettings`: every problem at once, with its line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from eval.options import has_option
from eval.settings import EvalSettings
from prefopt.errors import ConfigError
from prefopt.recipe.explain import explain
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
    problems = list(document.problems)
    for key, path in (("model", model), ("baseline", baseline)):
        if path is not None:
            section = raw.get(key) or {}
            raw[key] = {**section, "path": path} if isinstance(section, dict) else section
    raw |= {key: value for key, value in (("limit", limit), ("seed", seed)) if value is not None}
    try:
        settings = EvalSettings.model_validate(raw)
    except ValidationError as error:
        problems += [explain(item, document, _known(item["loc"])) for item in error.errors()]
        raise ConfigError(problems, source=str(config) if config else None) from error
    if problems:
        raise ConfigError(problems, source=str(config) if config else None)
    return settings


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


def _known(path: Iterable[str | int]) -> set[str]:
    """The keys of the section that the last key of ``path`` is in."""
    section: Any = EvalSettings
    for key in list(path)[:-1]:
        field = section.model_fields.get(str(key)) if section else None
        section = _section(field.annotation) if field else None
    return set(section.model_fields) if section else set()


def _section(annotation: Any) -> type[BaseModel] | None:
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None
