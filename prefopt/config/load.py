"""From a YAML file and overrides to a validated ``Recipe``: all problems at once, each with its line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from prefopt.config.schema import PeftSection, Recipe
from prefopt.config.yaml_file import Lines, apply_overrides, read_yaml
from prefopt.errors import ConfigError, suggest
from prefopt.registry import get_objective, objective_names

# Keys people bring from other tools or from papers, with what they are called here.
RENAMED = {
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "nothing: it is derived from train.global_batch_size",
    "simpo_gamma": "objective.gamma",
    "gamma_beta_ratio": "objective.gamma, as gamma_beta_ratio * beta",
    "max_length": "data.max_length_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "num_train_epochs": "train.num_epochs",
    "lr_scheduler_type": "train.lr_scheduler",
    "warmup_ratio": "train.warmup_frac",
    "save_steps": "train.save_every",
    "eval_steps": "train.eval_every",
    "logging_steps": "train.log_every",
    "report_to": "run.trackers",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Returns the validated recipe of a YAML file with ``section.key=value`` overrides applied.

    Covers structure, types, bounds, names and hyper-parameters; whether files exist and settings go
    together is `prefopt.config.check.check_recipe`.
    Raises: ConfigError listing every problem with the line it stands on.
    """
    file = Path(path)
    raw, lines = read_yaml(file)
    raw = apply_overrides(raw, overrides)
    problems: list[str] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems += [_explain(item, raw, lines) for item in error.errors()]
    problems += _plugin_problems(raw, file)
    problems += objective_problems(raw.get("objective"), lines)
    if problems or recipe is None:
        raise ConfigError(problems, source=str(file))
    return recipe


def objective_problems(section: Any, lines: Lines | None = None) -> list[str]:
    """Problems of the ``objective`` section: unknown name, unknown, missing or out-of-bound hyper-parameter."""
    if not isinstance(section, dict):
        return []  # absent, or a wrong type the schema has already reported
    lines = lines or {}
    name = section.get("name")
    if name is None:
        return [f"{_at(('objective',), lines)}objective.name is missing; {suggest('', objective_names())}"]
    if not isinstance(name, str) or name not in objective_names():
        where = _at(("objective", "name"), lines)
        return [f"{where}objective.name = {name!r}: unknown; {suggest(str(name), objective_names())}"]
    if importlib.util.find_spec("torch") is None:
        return []  # the signature lives beside torch code; structure has been checked all the same
    values = {key: value for key, value in section.items() if key != "name"}
    try:
        objective_schema(name).model_validate(values)
    except ValidationError as error:
        return [_explain(item, section, lines, prefix=("objective",)) for item in error.errors()]
    return []


def objective_schema(name: str) -> type[BaseModel]:
    """The pydantic model of an objective's hyper-parameters, made from its keyword-only signature."""
    config = ConfigDict(extra="forbid", strict=True)
    fields: Any = get_objective(name).fields
    return create_model(f"{name}_hyperparameters", __config__=config, **fields)


def _plugin_problems(raw: dict[str, Any], file: Path) -> list[str]:
    """Imports the recipe's plugins, so that objectives they register are known; returns what failed."""
    problems = []
    plugins = raw.get("plugins") or ()
    for plugin in plugins if isinstance(plugins, (list, tuple)) else ():
        path = (file.parent / str(plugin)).resolve()
        if not path.is_file():
            problems.append(f"plugins: {plugin!r}: no such file (looked for {path}); paths are relative to the recipe")
            continue
        name = f"prefopt_plugin_{path.stem}"
        if getattr(sys.modules.get(name), "__file__", None) == str(path):
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # a .py path always has both
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # noqa: BLE001  (user code: whatever it raises, name the file)
            problems.append(f"plugins: {plugin!r} raised {type(error).__name__}: {error}")
    return problems


def _at(path: tuple[str | int, ...], lines: Lines) -> str:
    """``line 12: `` for the nearest enclosing key that has a line, else nothing (an override)."""
    line = lines.get(path)
    return f"line {line}: " if line else ""


def _explain(item: Any, raw: Any, lines: Lines, prefix: tuple[str, ...] = ()) -> str:
    """One sentence for one pydantic error, in the project's template."""
    path = (*prefix, *item["loc"])
    key = ".".join(map(str, path))
    where = _at(path, lines)
    value = f" = {item['input']!r}" if not isinstance(item["input"], (dict, list)) else ""
    if item["type"] == "extra_forbidden":
        renamed = RENAMED.get(str(path[-1]))
        hint = f"here it is {renamed}" if renamed else suggest(str(path[-1]), _known_keys(path, raw))
        return f"{where}{key}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{_at(path[:-1], lines)}{key} is missing: {_doc(path) or 'it is required'}"
    return f"{where}{key}{value}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _section(path: tuple[str | int, ...]) -> type[BaseModel] | None:
    """The schema class of the section that holds the last key of ``path``."""
    model: Any = Recipe
    for part in path[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        if field is None:
            return None
        model = next((a for a in _flatten(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if model is None:
            return None
    return model


def _flatten(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    return [annotation, *(inner for argument in arguments for inner in _flatten(argument))]


def _known_keys(path: tuple[str | int, ...], raw: Any) -> set[str]:
    if path[0] == "objective":
        return set(get_objective(raw["name"]).fields) | {"name"}
    section = _section(path)
    return set(section.model_fields) if section and section is not PeftSection else set()


def _doc(path: tuple[str | int, ...]) -> str | None:
    section = _section(path)
    field = section.model_fields.get(str(path[-1])) if section else None
    return " ".join(field.description.split()) if field is not None and field.description else None
