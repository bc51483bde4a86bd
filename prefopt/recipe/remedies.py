"""What to write instead of a value that does not fit, where the value tells what was meant."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from prefopt.recipe.other_tools import value_hint
from prefopt.recipe.registry import objective_names
from prefopt.recipe.walk import Schema, field_of, short_key
from prefopt.recipe.yaml_file import KeyPath

_SCALARS = {"string_type", "int_type", "float_type", "bool_type", "literal_error", "int_from_float"}
_SECTIONS = {"model_type", "dict_type"}
_BOOLEANS = {"true", "false"}


def remedy(item: Mapping[str, Any], schema: Schema, raw: Any) -> str:
    """The end of the sentence about one entry of ``ValidationError.errors()``, from its punctuation on."""
    path: KeyPath = tuple(item["loc"])
    kind, value = item["type"], item["input"]
    if value is None and (default := _default(path, schema, raw)) is not None:
        return f"; leave the key out for its default, {default}."
    if kind in _SECTIONS:
        return _section(path, value, schema, raw)
    if kind == "tuple_type":
        return _list(path, value, schema, raw)
    if path == ("stage",) and isinstance(value, str) and value.lower() in objective_names():
        return f"; write objective: {{name: {value.lower()}}}."
    brought = value_hint(*_section_and_key(path), value)
    if brought is not None:
        return f"; {brought}."
    if kind in _SCALARS and isinstance(value, list | tuple):
        return f"; it is a list: write {value[0]}." if len(value) == 1 else ", and is a list."
    return _scalar(item)


def _scalar(item: Mapping[str, Any]) -> str:
    kind, value = item["type"], item["input"]
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes."
    if not isinstance(value, str):
        return "."
    is_number = kind in {"int_type", "float_type"} and _is_number(value)
    if is_number or (kind == "bool_type" and value in _BOOLEANS):
        return ", without quotes."
    if kind == "literal_error":
        near = difflib.get_close_matches(value, _choices(item), n=1, cutoff=0.6)
        return f"; did you mean {near[0]!r}?" if near else "."
    return "."


def _section(path: KeyPath, value: Any, schema: Schema, raw: Any) -> str:
    key = short_key(schema, path, raw)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | Mapping):
        return "; it is a list: leave out the brackets, or the dash."
    if not isinstance(value, str) or not value:
        return "."
    if key is None:
        return ", one a line under it, or {key: value}."
    return f"; write {_short(path, key, value)}."


def _short(path: KeyPath, key: str, value: str) -> str:
    """A section with this one key, and what the value is here where another tool has it."""
    brought = value_hint(_section_and_key(path)[1], key, value) if key == "name" else None
    return f"{{{key}: …}}; {value} {brought}" if brought else f"{{{key}: {value}}}"


def _list(path: KeyPath, value: Any, schema: Schema, raw: Any) -> str:
    key = short_key(schema, path, raw)
    brought = value_hint(*_section_and_key(path), value)
    if brought is not None:
        return f"; {brought}."
    if isinstance(value, str):
        return f": [{value if key is None else _short(path, key, value)}]."
    if isinstance(value, Mapping):
        return ": a dash (-) before the first key of each item."
    return "."


def _default(path: KeyPath, schema: Schema, raw: Any) -> str | None:
    """The default of a key that could be left out, where it is a plain value."""
    field = field_of(schema, path, raw) if path and isinstance(path[-1], str) else None
    if field is None or field.is_required():
        return None
    default = field.get_default(call_default_factory=True)
    if isinstance(default, bool):
        return str(default).lower()
    return str(default) if isinstance(default, str | int | float) else None


def _section_and_key(path: KeyPath) -> tuple[str, str]:
    keys = [part for part in path if isinstance(part, str)]
    return (keys[0] if len(keys) > 1 else "", keys[-1]) if keys else ("", "")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _choices(item: Mapping[str, Any]) -> list[str]:
    expected = str(item["ctx"]["expected"]).replace(" or ", ", ")
    return [choice.strip("'") for choice in expected.split(", ")]
