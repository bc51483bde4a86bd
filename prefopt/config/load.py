"""From a YAML file and overrides to a validated ``Recipe``: every problem at once, with its line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from prefopt.config.explain import explain
from prefopt.config.schema import Recipe
from prefopt.config.yaml_file import Document, apply_overrides, read_yaml
from prefopt.errors import ConfigError, suggest
from prefopt.registry import get_objective, objective_names


@dataclass(frozen=True)
class Draft:
    """A recipe that may still be wrong: its sound sections, and what is wrong with the others."""

    recipe: Recipe
    """Holds every section that is sound by itself; a section in ``broken`` is absent or a default."""
    document: Document
    problems: tuple[str, ...]
    broken: frozenset[str]
    """Names of top-level keys with a problem of their own: rules across sections pass them over."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Returns the validated recipe of a YAML file with ``section.key=value`` overrides applied.

    Covers structure, types, bounds, names and hyper-parameters; whether settings go together and
    files exist is `prefopt.checks.check`.
    Raises: ConfigError listing every problem with the line it stands on.
    """
    draft = draft_recipe(path, overrides)
    if draft.problems:
        raise ConfigError(draft.problems, source=str(path))
    return draft.recipe


def draft_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Draft:
    """Returns what can be made of a YAML file, with all structural problems instead of an exception.

    Raises: ConfigError only for a file that cannot be read as a YAML mapping at all.
    """
    document = apply_overrides(read_yaml(Path(path)), overrides)
    problems = list(document.problems)
    broken: set[str] = set()
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(document.raw)
    except ValidationError as error:
        items = _without_noise(error.errors())
        problems += [explain(item, document) for item in items]
        broken |= {str(item["loc"][0]) for item in items}
    problems += (plugin_problems := _plugin_problems(document, Path(path)))
    objective_problems = _objective_problems(document)
    if objective_problems or plugin_problems:
        broken.add("objective")
    problems += objective_problems
    if recipe is None:
        recipe = _sound_sections(document.raw, broken)
    return Draft(recipe, document, tuple(problems), frozenset(broken))


def objective_schema(name: str) -> type[BaseModel]:
    """The pydantic model of an objective's hyper-parameters, made from its keyword-only signature.

    Raises: ConfigError for an unknown name.
    """
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    fields: Any = get_objective(name).fields
    return create_model(f"{name}_hyperparameters", __config__=config, **fields)


def _sound_sections(raw: Mapping[str, Any], broken: set[str]) -> Recipe:
    """The recipe without its broken sections, unvalidated as a whole."""
    sound = {}
    for name, field in Recipe.model_fields.items():
        if name in raw and name not in broken:
            annotation: Any = field.annotation
            sound[name] = TypeAdapter(annotation).validate_python(raw[name])
    return Recipe.model_construct(**sound)


def _without_noise(items: Sequence[Any]) -> list[Any]:
    """Drops an error that only says that something inside failed, e.g. a list left empty by it."""
    paths = [item["loc"] for item in items]
    return [
        item
        for item in items
        if item["type"] != "too_short"
        or not any(p[: len(item["loc"])] == item["loc"] != p for p in paths)
    ]


def _objective_problems(document: Document) -> list[str]:
    """Unknown name; unknown, missing, mistyped or out-of-bound hyper-parameter of ``objective``."""
    section = document.raw.get("objective")
    if not isinstance(section, dict):
        return []  # absent, or a wrong type the schema has already reported
    name = section.get("name")
    if name is None:
        where = document.origin(("objective",))
        return [f"{where}objective.name is missing. Known: {', '.join(sorted(objective_names()))}."]
    if not isinstance(name, str) or name not in objective_names():
        where = document.origin(("objective", "name"))
        return [
            f"{where}objective.name = {name!r}: unknown; {suggest(str(name), objective_names())}"
        ]
    try:
        schema = objective_schema(name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return []  # signatures live beside torch code; structure is checked all the same without it
    try:
        schema.model_validate({key: value for key, value in section.items() if key != "name"})
    except ValidationError as error:
        known = {*schema.model_fields, "name"}
        items = [{**item, "loc": ("objective", *item["loc"])} for item in error.errors()]
        return [explain(item, document, known) for item in items]
    return []


def _plugin_problems(document: Document, file: Path) -> list[str]:
    """Imports the recipe's plugins, so that objectives they register are known; returns what failed."""
    problems = []
    plugins = document.raw.get("plugins")
    for index, plugin in enumerate(plugins if isinstance(plugins, list) else []):
        where = f"{document.origin(('plugins', index))}plugins.{index} = {plugin!r}"
        path = (file.parent / str(plugin)).resolve()
        if path.suffix != ".py" or not path.is_file():
            problems.append(
                f"{where}: no such Python file; a path is relative to the recipe: {path}"
            )
            continue
        try:
            _import_file(path)
        except Exception as error:  # user code: whatever it raises, say which file raised it
            problems.append(f"{where}: importing it raised {type(error).__name__}: {error}")
    return problems


def _import_file(path: Path) -> None:
    """Imports a Python file once a process."""
    name = f"prefopt_plugin_{path.stem}"
    if getattr(sys.modules.get(name), "__file__", None) == str(path):
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py path always has both
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # a half-imported plugin must not pass for an imported one
        raise
