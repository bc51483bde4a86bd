"""What to write instead of a key that a schema does not have: the nearest, or what another tool's is here."""

from __future__ import annotations

import difflib
import functools
import re
from typing import Any

from prefopt.errors import suggest
from prefopt.recipe.other_tools import (
    OF_PIPELINES,
    family_hint,
    hint_for,
    value_hint,
    written_here,
)
from prefopt.recipe.registry import objective_keys
from prefopt.recipe.walk import Schema, known_keys, sections
from prefopt.recipe.yaml_file import KeyPath

_A_SLIP, _NEAR, _FAR = 0.85, 0.75, 0.7
"""How alike two names are (difflib): one is the other mistyped; may be meant; at the least."""
_MOST_PLACES = 3
_HERE_IT_IS = re.compile(r"here it is (?:([\w.]+)\.)?(\w+)")


def instead_of(
    path: KeyPath, value: Any, schema: Schema, raw: Any, also: frozenset[str] = frozenset()
) -> str:
    """The end of a sentence about the unknown key at ``path``.

    Args:
        path: in ``raw``, which was written for ``schema``.
        value: what stands there.
        also: keys beside those of the schema that are read by someone else.
    """
    name, known = str(path[-1]), known_keys(schema, path, raw)
    known |= also if len(path) == 1 else set()
    section = "" if len(path) == 1 else str(path[0])
    if not _is_recipe(schema):
        return OF_PIPELINES.get(name) or _nearest(name, known, schema)
    if "." in name:
        return _dotted(name, schema)
    brought = hint_for(section, name)
    if brought is not None:
        return brought + _value(brought, value)
    return _of_recipe(name, section, known, schema)


def _of_recipe(name: str, section: str, known: set[str], schema: Schema) -> str:
    places = _places(schema)
    spelt = written_here(name)
    if section != "objective" and spelt in objective_keys():
        return f"it is a key of the objective: objective.{spelt}"
    if spelt not in known and spelt in places:
        return f"did you mean {_listed(places[spelt])}?"
    if difflib.get_close_matches(spelt, known, n=1, cutoff=_A_SLIP):
        return suggest(spelt, known)
    return family_hint(spelt) or _nearest(spelt, known, schema)


def _nearest(name: str, known: set[str], schema: Schema) -> str:
    if difflib.get_close_matches(name, known, n=1, cutoff=_NEAR):
        return suggest(name, known)
    places = _places(schema)
    near = difflib.get_close_matches(name, places, n=1, cutoff=_A_SLIP)
    return f"did you mean {_listed(places[near[0]])}?" if near else suggest(name, known, _FAR)


def _dotted(name: str, schema: Schema) -> str:
    """Of a key with a dot in it: overrides are written so, and keys of OpenRLHF and Hydra."""
    head, _, last = name.rpartition(".")
    if any(last in section.model_fields for place, section in sections(schema) if place == head):
        return f"in a file sections are nested: write {last} under {head}"
    found = hint_for(head.split(".")[0], last)
    places = _places(schema)
    if found is None and last in places:
        found = f"did you mean {_listed(places[last])}?"
    if found is None:
        found = family_hint(written_here(name).replace(".", "_")) or family_hint(written_here(last))
    return found or "no key holds a dot: in a file sections are nested"


@functools.cache
def _places(schema: Schema) -> dict[str, list[str]]:
    """Where each key stands."""
    found: dict[str, list[str]] = {}
    for dotted, section in sections(schema):
        for field in section.model_fields:
            found.setdefault(field, []).append(f"{dotted}.{field}".lstrip("."))
    return found


def _listed(places: list[str]) -> str:
    named = list(dict.fromkeys(places))
    more = " or elsewhere" if len(named) > _MOST_PLACES else ""
    return " or ".join(named[:_MOST_PLACES]) + more


def _value(brought: str, value: Any) -> str:
    """What the value is under the key that it is here, with a leading semicolon."""
    found = _HERE_IT_IS.fullmatch(brought)
    said = value_hint(found[1] or "", found[2], value) if found else None
    return f"; {value!r}: {said}" if said else ""


def _is_recipe(schema: Schema) -> bool:
    return "objective" in schema.model_fields
