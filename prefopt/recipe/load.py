"""From a YAML file and overrides to a validated ``Recipe``: every problem at once, with its line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from prefopt.errors import ConfigError, suggest
from prefopt.recipe.explain import explain
from prefopt.recipe.registry import REGISTRIES, Spec, get_objective
from prefopt.recipe.schema import Recipe
from prefopt.recipe.yaml_file import Document, KeyPath, apply_overrides, read_yaml


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
    files exist is `prefopt.recipe.checks.check`.
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
    return draft_document(apply_overrides(read_yaml(Path(path)), overrides), Path(path))


def draft_document(document: Document, path: Path) -> Draft:
    """As `draft_recipe`, of a file that has been read; plugins are relative to ``path``."""
    problems = list(document.problems)
    broken: set[str] = set()
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(document.raw)
    except ValidationError as error:
        items = _without_noise(error.errors())
        problems += [explain(item, document) for item in items]
        broken |= {str(item["loc"][0]) for item in items}
    problems += (from_plugins := plugin_problems(document, path))
    for section in REGISTRIES:
        section_problems = _named_problems(document, section)
        if section_problems or from_plugins:
            broken.add(section)
        problems += section_problems
    if recipe is None:
        recipe = _sound_sections(document.raw, broken)
    return Draft(recipe, document, tuple(problems), frozenset(broken))


def objective_schema(name: str) -> type[BaseModel]:
    """The pydantic model of an objective's hyper-parameters, made from its keyword-only signature.

    Raises: ConfigError for an unknown name.
    """
    return _schema(get_objective(name))


def _schema(spec: Spec, extra: Mapping[str, Any] | None = None) -> type[BaseModel]:
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    fields: Any = {**spec.fields, **(extra or {})}
    return create_model(f"{spec.name}_hyperparameters", __config__=config, **fields)


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


# What a recipe may say of an entry beside its own hyper-parameters.
_SHARED_KEYS: dict[str, dict[str, Any]] = {"signals": {"weight": (float, 1.0)}}


def _named_problems(document: Document, section: str) -> list[str]:
    """What is wrong with the entries of ``objective``, ``credit`` or ``signals``: names and their keys."""
    found = document.raw.get(section)
    if isinstance(found, dict):
        return entry_problems(document, (section,), found, section)
    items = found if isinstance(found, list) else []  # another type the schema has already reported
    return [
        problem
        for index, item in enumerate(items)
        if isinstance(item, dict)
        for problem in entry_problems(document, (section, index), item, section)
    ]


def entry_problems(
    document: Document, path: KeyPath, entry: Mapping[str, Any], section: str
) -> list[str]:
    """What is wrong with one named entry: unknown name; unknown, missing, mistyped or out-of-bound key.

    Args:
        document: as written, for line numbers.
        path: of the entry in it.
        entry: its ``name`` and keys.
        section: a key of `prefopt.recipe.registry.REGISTRIES`.
    """
    registry, key = REGISTRIES[section], ".".join(map(str, path))
    known, name = registry.names(), entry.get("name")
    if name is None:
        return [f"{document.origin(path)}{key}.name is missing. Known: {', '.join(sorted(known))}."]
    if not isinstance(name, str) or name not in known:
        where = document.origin((*path, "name"))
        return [f"{where}{key}.name = {name!r}: unknown; {suggest(str(name), known)}"]
    try:
        schema = _schema(registry.get(name), _SHARED_KEYS.get(section))
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return []  # signatures live beside torch code; structure is checked all the same without it
    try:
        schema.model_validate({key: value for key, value in entry.items() if key != "name"})
    except ValidationError as error:
        items = [{**item, "loc": (*path, *item["loc"])} for item in error.errors()]
        return [explain(item, document, {*schema.model_fields, "name"}) for item in items]
    return []


def plugin_problems(document: Document, file: Path) -> list[str]:
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
            import_plugin(path)
        except Exception as error:  # user code: whatever it raises, say which file raised it
            problems.append(f"{where}: importing it raised {type(error).__name__}: {error}")
    return problems


def import_plugin(path: Path) -> None:
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
