"""Sentences for schema errors: what was set, what is required, what the key is, what to do instead."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.errors import suggest
from prefopt.recipe.entries import MISSING_NAME, UNKNOWN_NAME
from prefopt.recipe.other_tools import hint_for
from prefopt.recipe.registry import objective_keys, objective_names
from prefopt.recipe.walk import Schema, document_string, known_keys, owners, sections
from prefopt.recipe.yaml_file import Document, KeyPath

# pydantic error type -> what is required, filled from the error's context.
REQUIREMENTS = {
    "bool_type": "must be true or false",
    "dict_type": "must be a section of keys",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be <= {le:g}",
    "literal_error": "must be {expected}",
    "model_type": "must be a section of keys",
    "string_type": "must be text",
    "too_short": "must hold at least {min_length} item(s)",
    "tuple_type": "must be a list",
}


_SHOWN = 200


def show_value(value: Any) -> str:
    """A value as YAML would have it, for ``key = value``."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except TypeError:
        text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


@dataclass(frozen=True)
class Written:
    """Values as someone wrote them, the schema they are to fit, and where they stand."""

    schema: Schema
    raw: Any
    document: Document
    """For line numbers."""
    place: KeyPath = ()
    """Where ``raw`` stands in the document."""
    also: frozenset[str] = frozenset()
    """Keys beside those of the schema that are read by someone else."""


def explain(item: Mapping[str, Any], written: Written) -> str:
    """One sentence or two for one entry of ``ValidationError.errors()``."""
    path: KeyPath = tuple(item["loc"])
    key = ".".join(map(str, (*written.place, *path)))
    where = f"{written.document.origin((*written.place, *path))}{key}"
    kind, value = item["type"], item["input"]
    shown = "" if isinstance(value, dict | list | tuple) else f" = {show_value(value)}"
    if kind == "extra_forbidden":
        belongs = _belongs(path, key, written)
        return (
            f"{where}{shown}: {belongs}"
            if belongs
            else f"{where}: unknown key; {_hint(path, written)}"
        )
    if kind == "missing":
        doc = document_string(written.schema, path, written.raw)
        said = [*_of_choice(path, key, written), *([doc] if doc else [])]
        return f"{where} is missing{': ' + ' '.join(said) if said else ''}"
    if kind == MISSING_NAME:
        return f"{where} {item['msg']}"
    if kind == UNKNOWN_NAME:
        return f"{where}{shown}: {item['msg']}"
    template = REQUIREMENTS.get(kind)
    required = template.format(**item.get("ctx", {})) if template else _lower(item["msg"])
    return f"{where}{shown}: {required}{_remedy(item)}{_what_it_is(path, written)}"


def _belongs(path: KeyPath, key: str, written: Written) -> str | None:
    """Whose key this is, where another name of its section would have it."""
    found = owners(written.schema, path, written.raw)
    if found is None:
        return None
    chosen, names = found
    name = f"{key.rpartition('.')[0]}.name"
    wanted = " or ".join(map(repr, names))
    return f"belongs to {name} = {wanted}, and {name} is {chosen!r}. Leave it out, or choose another name"


def _of_choice(path: KeyPath, key: str, written: Written) -> list[str]:
    """Which name of the section asks for this key, where another would not."""
    found = owners(written.schema, path, written.raw)
    return [] if found is None else [f"{key.rpartition('.')[0]}.name = {found[0]!r} needs it."]


def _hint(path: KeyPath, written: Written) -> str:
    """What to write instead of an unknown key: a renamed one, the nearest here, or one elsewhere."""
    name = str(path[-1])
    known = known_keys(written.schema, path, written.raw)
    known |= written.also if len(path) == 1 else set()
    brought = hint_for("" if len(path) == 1 else str(path[0]), name)
    if brought is not None:
        return brought
    of_recipe = "objective" in written.schema.model_fields and path[0] != "objective"
    if of_recipe and name in objective_keys():
        return f"it is a key of the objective: objective.{name}"
    if difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return suggest(name, known)
    elsewhere: dict[str, list[str]] = {}
    for dotted, section in sections(written.schema):
        for field in section.model_fields:
            elsewhere.setdefault(field, []).append(f"{dotted}.{field}".lstrip("."))
    near = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.85)
    if near:
        return f"did you mean {' or '.join(dict.fromkeys(elsewhere[near[0]]))}?"
    return suggest(name, known)


def _remedy(item: Mapping[str, Any]) -> str:
    """What to write instead, where the value tells, ending the sentence."""
    kind, value = item["type"], item["input"]
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes."
    if kind in {"int_type", "float_type"} and isinstance(value, str) and _is_number(value):
        return ", without quotes."
    if kind == "tuple_type" and isinstance(value, str):
        return f": [{value}]."
    if kind == "model_type" and isinstance(value, str):
        return ", one a line under it, or {key: value}."
    is_stage = tuple(item["loc"]) == ("stage",)
    if is_stage and isinstance(value, str) and value in objective_names():
        return f"; write objective: {{name: {value}}}."
    if kind == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(value, _choices(item), n=1, cutoff=0.6)
        return f"; did you mean {near[0]!r}?" if near else "."
    return "."


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _choices(item: Mapping[str, Any]) -> list[str]:
    expected = str(item["ctx"]["expected"]).replace(" or ", ", ")
    return [choice.strip("'") for choice in expected.split(", ")]


def _what_it_is(path: KeyPath, written: Written) -> str:
    """The first sentence of the key's documentation, with a leading space, where it has one."""
    doc = document_string(written.schema, path, written.raw)
    if not doc:
        return ""
    sentence = doc.split(". ")[0].rstrip(".…, ")
    return f" {sentence}."


def _lower(message: str) -> str:
    return message[0].lower() + message[1:]
