"""The one walker of schemas: which keys there are, who reads them, and which mark they carry.

Used for recipes, evaluations, pipelines and schedules alike. A step of a path is a key or the number of an item;
what a name chooses (`prefopt.recipe.section.ByName`, `prefopt.recipe.entries.Entry`) is looked up in the values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prefopt.recipe.entries import Entry
from prefopt.recipe.section import NoEffect, choice_name
from prefopt.recipe.yaml_file import KeyPath

Schema = type[BaseModel]
Computed = Literal["run", "rows"]
"""What a setting may have no effect on; see `NoEffect`."""


def sections(schema: Schema, prefix: str = "") -> Iterator[tuple[str, Schema]]:
    """Every section as ``(dotted name, class)``; list items are written ``N``, and each choice comes by itself."""
    yield prefix, schema
    for key, field in schema.model_fields.items():
        item = ".N" if get_origin(_bare(field.annotation)) is tuple else ""
        for inner in choices(field.annotation):
            yield from sections(inner, f"{prefix}.{key}{item}".lstrip("."))


def choices(annotation: Any) -> tuple[Schema, ...]:
    """The section classes that a type names: none, one, or those of which a name chooses."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    return tuple(each for argument in get_args(annotation) for each in choices(argument))


def is_choice(members: Sequence[Schema]) -> bool:
    """Does a key ``name`` say which of these is meant, and not the shape of the value?"""
    return len(members) > 1 and all("name" in each.model_fields for each in members)


def holder(schema: Schema, path: KeyPath, raw: Any) -> Schema | None:
    """The class of the section that holds the last key of ``path``; ``raw`` is what was written for ``schema``."""
    return _walk(schema, path, raw)[0]


def field_of(schema: Schema, path: KeyPath, raw: Any) -> FieldInfo | None:
    """The field at ``path``, None for a key that the schema does not have."""
    section = holder(schema, path, raw)
    return section.model_fields.get(str(path[-1])) if section else None


def document_string(schema: Schema, path: KeyPath, raw: Any) -> str | None:
    """The documentation of a key, on one line; None for one without, or that the schema does not have."""
    field = field_of(schema, path, raw)
    return " ".join(field.description.split()) if field and field.description else None


def known_keys(schema: Schema, path: KeyPath, raw: Any) -> set[str]:
    """The last key of ``path`` and those beside it; none for a section that takes any."""
    section, annotation = _walk(schema, path, raw)
    if section is None or section.model_config.get("extra") == "allow":
        return set()
    return {*section.model_fields, *(("name",) if _entry(annotation) else ())}


def owners(schema: Schema, path: KeyPath, raw: Any) -> tuple[str, list[str]] | None:
    """Of a key that belongs to other choices than the one made: the name chosen, and the names to choose."""
    section, annotation = _walk(schema, path, raw)
    entry = _entry(annotation)
    if entry is not None:
        having = entry.having(str(path[-1]))
        return (str(at(raw, path[:-1])["name"]), having) if section and having else None
    members = choices(annotation) if is_choice(choices(annotation)) else ()
    having = [choice_name(each) for each in members if path[-1] in each.model_fields]
    chosen = [choice_name(each) for each in members if each is section]
    return (chosen[0], having) if chosen and having else None


def short_key(schema: Schema, path: KeyPath, raw: Any) -> str | None:
    """Whose value a bare text would be that stands in the place of the section, or sections, at ``path``."""
    section, annotation = _walk(schema, (*path, ""), raw)
    if _entry(annotation) is not None or is_choice(choices(annotation)):
        return "name"
    fields = section.model_fields if section else {}
    required = [key for key, field in fields.items() if field.is_required()]
    if len(required) == 1:
        return required[0]
    return "type" if "type" in fields else None


def at(raw: Any, path: Sequence[str | int]) -> Any:
    """The value at a key path of what was written, None where there is none."""
    for part in path:
        if isinstance(raw, Mapping):
            raw = raw.get(part)
        elif isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        else:
            return None
    return raw


def recorded(schema: Schema, dump: Mapping[str, Any], on: Computed) -> dict[str, Any]:
    """What a record of these settings holds: a hash of it changes when, and only when, what is computed may.

    Keys without an effect on it (`NoEffect`) are left out. A section that a name chooses has the keys of the
    other choices too, at their defaults: a record then does not depend on which of them the name has.

    Args:
        schema: of the settings.
        dump: the settings as JSON.
        on: what is computed; see `NoEffect`.
    """
    found = {}
    for key, value in dump.items():
        field = schema.model_fields.get(key)
        if field is None:
            found[key] = value
        elif not has_no_effect(field, on):
            found[key] = _recorded_value(_annotation(field), value, on)
    return found


def has_no_effect(field: FieldInfo, on: Computed) -> bool:
    """Is the field marked to have no effect on it?"""
    return any(isinstance(mark, NoEffect) and mark.on in (on, "both") for mark in field.metadata)


def _recorded_value(annotation: Any, value: Any, on: Computed) -> Any:
    if isinstance(value, list | tuple):
        return [_recorded_value(annotation, each, on) for each in value]
    chosen = _chosen(annotation, value) if isinstance(value, Mapping) else None
    if chosen is None:
        return value
    found = recorded(chosen, value, on)
    members = choices(annotation)
    for field_name, field in ((k, f) for each in members for k, f in each.model_fields.items()):
        if is_choice(members) and has_no_effect(field, on):
            found.pop(field_name, None)  # of a record that held the keys of every choice
        elif is_choice(members):
            found.setdefault(field_name, _json_default(field))
    return found


def _json_default(field: FieldInfo) -> Any:
    """The default as a dump has it; null where there is none."""
    if field.is_required():
        return None
    default = field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def default_at(schema: Schema, path: KeyPath, raw: Any, otherwise: Any) -> Any:
    """The default of a key as a dump has it; ``otherwise`` for one that has none, or that there is none of."""
    field = field_of(schema, path, raw) if isinstance(path[-1], str) else None
    if field is None or field.is_required():
        return otherwise
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return default.model_dump(mode="json")
    return list(default) if isinstance(default, tuple) else default


def _walk(schema: Schema, path: KeyPath, raw: Any) -> tuple[Schema | None, Any]:
    """The section that holds the last key of ``path``, and the type that names it (None for ``schema`` itself)."""
    section: Schema | None = schema
    annotation: Any = None
    for part in path[:-1]:
        raw = at(raw, (part,))
        if isinstance(part, str):
            field = section.model_fields.get(part) if section else None
            annotation = _annotation(field) if field else None
        section = _chosen(annotation, raw)
    return section, annotation


def _annotation(field: FieldInfo) -> Any:
    """The type of a field with its marks, which pydantic keeps apart."""
    marked = (field.annotation, *field.metadata)
    return Annotated[marked] if field.metadata else field.annotation


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _chosen(annotation: Any, raw: Any) -> Schema | None:
    """The class of a section or entry with the value ``raw``."""
    entry = _entry(annotation)
    if entry is not None:
        return entry.parameters(raw)
    found = choices(annotation)
    if not is_choice(found):
        return found[0] if found else None
    name = raw.get("name") if isinstance(raw, Mapping) else None
    return next((each for each in found if choice_name(each) == name), found[0])


def _entry(annotation: Any) -> Entry | None:
    if get_origin(annotation) is Annotated:
        found = [each for each in get_args(annotation)[1:] if isinstance(each, Entry)]
        if found:
            return found[0]
    return next((each for a in get_args(annotation) if (each := _entry(a)) is not None), None)
