"""From a YAML file and overrides to a validated ``Recipe``: every problem at once, with its line."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from prefopt.errors import ConfigError
from prefopt.recipe.explain import Written, explain
from prefopt.recipe.plugin_code import leave_out
from prefopt.recipe.registry import REGISTRIES
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
    from_plugins = plugin_problems(document, path)
    found = validated(Recipe, document.raw, document)
    broken = found.broken | frozenset(REGISTRIES if from_plugins else ())
    recipe = found.value or _sound_sections(document.raw, broken)
    return Draft(
        recipe,
        document,
        (*document.problems, *found.problems, *from_plugins),
        broken,
    )


AnyModel = TypeVar("AnyModel", bound=BaseModel)


@dataclass(frozen=True)
class Validated(Generic[AnyModel]):
    """What became of some values: an object, or what is wrong with them."""

    value: AnyModel | None
    problems: tuple[str, ...] = ()
    broken: frozenset[str] = frozenset()
    """Keys of the schema with a problem."""


def validated(
    schema: type[AnyModel],
    raw: Any,
    document: Document | None = None,
    *,
    place: KeyPath = (),
    also: frozenset[str] = frozenset(),
) -> Validated[AnyModel]:
    """The values as an object of their schema, or every problem as a sentence with its line.

    Args:
        schema: of a recipe, a section, a pipeline, …
        raw: the values.
        document: where they were written, for line numbers.
        place: where in it.
        also: keys beside the schema's that someone else reads, for suggestions.
    """
    written = Written(schema, raw, document or Document({}), place, also)
    try:
        return Validated(schema.model_validate(raw))
    except ValidationError as error:
        items = _without_noise(error.errors())
        broken = frozenset(str(item["loc"][0]) for item in items if item["loc"])
        return Validated(None, tuple(explain(item, written) for item in items), broken)


def load_settings(
    schema: type[AnyModel], document: Document, source: Path | str | None
) -> AnyModel:
    """The settings of a whole document. Raises: ConfigError with every problem and its line."""
    found = validated(schema, document.raw, document)
    if document.problems or found.value is None:
        problems = [*document.problems, *found.problems]
        raise ConfigError(problems, source=str(source) if source else None)
    return found.value


def _sound_sections(raw: Mapping[str, Any], broken: frozenset[str]) -> Recipe:
    """The recipe without its broken sections, unvalidated as a whole."""
    sound = {}
    for name, field in Recipe.model_fields.items():
        if name in raw and name not in broken:
            annotation: Any = Annotated[(field.annotation, *field.metadata, field)]
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


def plugin_problems(document: Document, file: Path) -> list[str]:
    """Imports the recipe's plugins, so that objectives they register are known; returns what failed.

    Under `without_plugins` only that the files are there is looked at.
    """
    problems = []
    plugins = document.raw.get("plugins")
    for index, plugin in enumerate(plugins if isinstance(plugins, list) else []):
        where = f"{document.origin(('plugins', index))}plugins.{index} = {plugin!r}"
        path = (file.parent / str(plugin)).resolve()
        if path.suffix != ".py" or not os.path.isfile(path):
            problems.append(
                f"{where}: no such Python file; a path is relative to the recipe: {path}"
            )
            continue
        if leave_out(str(plugin)):
            continue
        try:
            import_plugin(path)
        except Exception as error:  # user code: whatever it raises, say which file raised it
            problems.append(f"{where}: importing it raised {type(error).__name__}: {error}")
    return problems


def plugins_named(path: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """The plugins that a file names, none of which is run for it. Raises: ConfigError for no YAML."""
    changed = [each for each in overrides if each.startswith("plugins")]
    named = apply_overrides(read_yaml(Path(path)), changed).raw.get("plugins")
    return [*map(str, named)] if isinstance(named, list) else []


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
