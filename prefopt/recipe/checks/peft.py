"""Rules about the peft section: its keys are those of peft's own config class, checked against it."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from prefopt.errors import ConfigError, suggest
from prefopt.recipe.checks.files import mistaken_for_hub, read_adapter_config
from prefopt.recipe.checks.rules import Finding, Surroundings, rule, was_set
from prefopt.recipe.local_paths import is_local
from prefopt.recipe.other_tools import PEFT, family_hint, hint_for, value_hint, written_here
from prefopt.recipe.peft_unfit import unfit
from prefopt.recipe.schema import PeftSection, Recipe

# Fields of a peft config that the loading code fills in.
SET_BY_CODE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}

BASE_RECORD = "prefopt_base.json"
"""File beside our adapters with the content hash of their base; see `models.adapters`."""

_PLAIN = {int: "a whole number", float: "a number", bool: "true or false"}


@rule("peft")
def peft_keys_exist(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if recipe.peft is None or recipe.peft.adapter is not None or _is_plain_lora(recipe.peft):
        return
    config_class = _config_class(recipe.peft.type)
    if config_class is None:
        known = [str(getattr(name, "value", name)).lower() for name in _config_classes()]
        brought = value_hint("peft", "type", recipe.peft.type)
        hint = f"{brought}. " if brought else ""
        yield Finding("peft.type", f"unknown peft type; {hint}{suggest(recipe.peft.type, known)}")
        return
    unfitting = dict(unfit(recipe.peft.type.lower(), recipe.peft.options.get, new=True))
    for key, why in unfitting.items():
        yield Finding(f"peft.{key}", why)
    if unfitting:
        return
    hints = typing.get_type_hints(config_class)
    fields = {field.name for field in dataclasses.fields(config_class)} - SET_BY_CODE
    sound = True
    for key, value in recipe.peft.options.items():
        problem = _key_problem(key, value, fields, hints, config_class.__name__)
        if problem:
            sound = False
            yield Finding(f"peft.{key}", problem)
    if sound:
        yield from _construct(recipe.peft)


@rule("model", "peft")
def dropout_is_not_switched_off(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if recipe.peft is None or not recipe.model.disable_dropout:
        return
    for key, value in recipe.peft.options.items():
        if key.endswith("dropout") and isinstance(value, int | float) and value > 0:
            yield Finding(
                f"peft.{key}",
                "would be ignored: model.disable_dropout is true, as in the papers of this family. "
                "Set it to 0, or model.disable_dropout: false to train with dropout",
            )


@rule("model", "peft")
def adapter_fits_base(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if recipe.peft is None or recipe.peft.adapter is None:
        return
    yield from _ignored_beside_adapter(recipe.peft)
    adapter = recipe.peft.adapter
    if not is_local(adapter):
        yield from mistaken_for_hub("peft.adapter", adapter)
        return
    directory = Path(adapter).expanduser()
    config = read_adapter_config(directory)
    if config is None:
        reason = (
            "has no readable adapter_config.json" if directory.is_dir() else "is not a directory"
        )
        yield Finding("peft.adapter", f"is not a saved adapter: {adapter} {reason}")
        return
    for key, why in unfit(str(config.get("peft_type", "")).lower(), config.get, new=False):
        value = config.get("peft_type" if key == "type" else key)
        yield Finding("peft.adapter", f"was made with {key} = {value!r}: {why}")
    base = config.get("base_model_name_or_path")
    path = recipe.model.path
    if not base or _same_model(base, path) or _same_model(adapter, path):
        return
    if (directory / BASE_RECORD).is_file():  # then loading compares contents, which outlive a name
        yield Finding(
            "peft.adapter",
            f"was trained on {base}, and model.path is {path}: loading compares their contents",
            is_note=True,
        )
    else:
        yield Finding(
            "peft.adapter",
            f"an adapter for another base: it was trained on {base}, and model.path is "
            f"{path}. Set model.path to its base; if that is the same model in another "
            "place, correct base_model_name_or_path in its adapter_config.json",
        )


def _is_plain_lora(peft: PeftSection) -> bool:
    """Is it LoRA with keys that do not depend on each other, with sound values? Then peft has nothing to add.

    Importing peft takes seconds; whatever is not plainly right here is left to its own class.
    """
    sound = (_PLAIN_LORA.get(key, _never)(value) for key, value in peft.options.items())
    return peft.type.lower() == "lora" and all(sound)


def _never(value: Any) -> bool:
    del value
    return False


def _are_names(value: Any) -> bool:
    return value == "all-linear" or (
        isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)
    )


# The keys of a plain LoRA recipe; a test compares with peft's own class.
_PLAIN_LORA: dict[str, Callable[[Any], bool]] = {
    "r": lambda value: _is(value, int) and value >= 1,
    "lora_alpha": lambda value: _is(value, int),
    "lora_dropout": lambda value: _is(value, float),
    "use_rslora": lambda value: _is(value, bool),
    "target_modules": _are_names,
}


def _ignored_beside_adapter(peft: PeftSection) -> Iterator[Finding]:
    keys = [*peft.options, *(["type"] if was_set(peft, "type") else [])]
    for key in sorted(keys):
        yield Finding(
            f"peft.{key}",
            "would be ignored: peft.adapter brings its own configuration. Leave it out",
        )


def _key_problem(key: str, value: Any, fields: set[str], hints: Any, owner: str) -> str | None:
    if key in SET_BY_CODE:
        return "is set by prefopt; leave it out"
    if key not in fields:
        return f"unknown key of peft's {owner}; {_instead(key, fields)}"
    kind = hints.get(key)
    wrong_type = kind in _PLAIN and not _is(value, kind)
    if wrong_type:
        return f"must be {_PLAIN[kind]} (peft's {owner})"
    if not _fits(value, kind):
        return f"must be {_said(kind)} (peft's {owner})"
    if key == "r" and isinstance(value, int) and value < 1:
        return "must be >= 1: a rank of 0 has nothing to train"
    return None


def _fits(value: Any, kind: Any) -> bool:
    """Is it of the type that peft says? A section may stand for a class of its own, which peft makes of it."""
    if isinstance(value, dict) and _names_a_class(kind):
        return True
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    except PydanticUserError:  # a type that pydantic has no word for: peft itself will say
        return True
    return True


def _names_a_class(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or any(map(_names_a_class, typing.get_args(kind)))


def _said(kind: Any) -> str:
    """A type in words as Python has them: ``list[str] | str``."""
    parts = (
        typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else [kind]
    )
    names = [
        getattr(part, "__name__", str(part)) if not typing.get_args(part) else str(part)
        for part in parts
    ]
    return " | ".join(
        "null" if name == "NoneType" else name.replace("typing.", "") for name in names
    )


def _instead(key: str, fields: set[str]) -> str:
    spelt = written_here(key)
    brought = PEFT.get(spelt) or hint_for("peft", spelt)
    if brought is not None:
        return brought
    slip = difflib.get_close_matches(spelt, PEFT, n=1, cutoff=0.85)
    if slip:
        return f"did you mean {slip[0]!r}? {PEFT[slip[0]]}"
    near = difflib.get_close_matches(spelt, fields, n=1, cutoff=0.75)
    return (None if near else family_hint(spelt)) or suggest(spelt, fields)


def _is(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _construct(peft: PeftSection) -> Iterator[Finding]:
    """Builds the configuration as loading will: types that do not fit, and peft's own objections."""
    from prefopt.recipe.peft_config import peft_config

    try:
        peft_config(peft)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("peft", " ".join(problem.split()))


def _config_classes() -> dict[Any, type]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING


def _config_class(name: str) -> type | None:
    classes = {str(getattr(kind, "value", kind)): cls for kind, cls in _config_classes().items()}
    return classes.get(name.upper())


def _same_model(base: str, path: str) -> bool:
    if base == path:
        return True
    try:
        return Path(base).expanduser().resolve() == Path(path).expanduser().resolve()
    except (OSError, ValueError, RuntimeError):  # no path at all: NUL, too long, the home of nobody
        return False
