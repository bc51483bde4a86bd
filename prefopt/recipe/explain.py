"""Sentences for schema errors: what was set, what is required, what the key is, what to do instead."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.recipe.entries import MISSING_NAME, UNKNOWN_NAME
from prefopt.recipe.remedies import remedy
from prefopt.recipe.unknown_keys import instead_of
from prefopt.recipe.walk import Schema, document_string, known_keys, owners
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
_NEAR = 0.75
_END_OF_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)\. ")


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
            else f"{where}: unknown key; {_instead(path, value, written)}"
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
    return f"{where}{shown}: {required}{remedy(item, written.schema, written.raw)}{_what_it_is(path, written)}"


def _instead(path: KeyPath, value: Any, written: Written) -> str:
    return instead_of(path, value, written.schema, written.raw, written.also)


def _belongs(path: KeyPath, key: str, written: Written) -> str | None:
    """Whose key this is, where another name of its section would have it."""
    found = owners(written.schema, path, written.raw)
    known = known_keys(written.schema, path, written.raw)
    if found is None or difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=_NEAR):
        return None  # or a key of the chosen one, not quite: epsilon of epsilon_low
    chosen, names = found
    name = f"{key.rpartition('.')[0]}.name"
    wanted = " or ".join(map(repr, names))
    return f"belongs to {name} = {wanted}, and {name} is {chosen!r}. Leave it out, or choose another name"


def _of_choice(path: KeyPath, key: str, written: Written) -> list[str]:
    """Which name of the section asks for this key, where another would not."""
    found = owners(written.schema, path, written.raw)
    return [] if found is None else [f"{key.rpartition('.')[0]}.name = {found[0]!r} needs it."]


def _what_it_is(path: KeyPath, written: Written) -> str:
    """The first sentence of the key's documentation, with a leading space, where it has one."""
    doc = document_string(written.schema, path, written.raw)
    if not doc:
        return ""
    sentence = _END_OF_SENTENCE.split(doc)[0].rstrip(".…, ")
    return f" {sentence}."


def _lower(message: str) -> str:
    return message[0].lower() + message[1:]
