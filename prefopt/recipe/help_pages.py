"""The pages of ``prefopt keys|objectives|credits|signals``, made from the schema and the registries.

Nothing is described here: a key's text is the docstring under its field, a function's is its own.
"""

from __future__ import annotations

import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from pydantic.fields import FieldInfo

from prefopt.errors import ConfigError, suggest
from prefopt.recipe.explain import show_value
from prefopt.recipe.registry import REGISTRIES, CreditSpec, Need, ObjectiveSpec, SignalSpec
from prefopt.recipe.schema import Recipe, Section
from prefopt.recipe.section import choice_name
from prefopt.recipe.specs import Spec
from prefopt.recipe.walk import Schema, is_choice, sections

_WIDTH = 96


def keys_page(only: str | None = None) -> str:
    """Every key of every section of a recipe, or of one section (``train``, ``data.train.N``), as text.

    Raises: ConfigError for a section there is none of.
    """
    return schema_page(Recipe, only)


def schema_page(schema: type[Section], only: str | None = None) -> str:
    """Every key below ``schema``, or of one of its sections. Raises: ConfigError as `keys_page`."""
    pages = {name: page for name, page in _section_pages(schema) if page}
    if only is None:
        return "\n\n".join(pages.values())
    wanted = re.sub(r"\.\d+", ".N", only)
    found = [
        page for name, page in pages.items() if name == wanted or name.startswith(f"{wanted}.")
    ]
    if not found:
        raise ConfigError(f"{only!r} is not a section; {suggest(wanted, [n for n in pages if n])}")
    return "\n\n".join(found)


def registry_page(section: str, name: str | None = None) -> str:
    """A line or two an entry of a registry, or one entry with its documentation.

    Args:
        section: the recipe section that names the entries: a key of `prefopt.recipe.registry.REGISTRIES`.
        name: the entry; default: all of them.

    Raises: ConfigError for an unknown name.
    """
    registry = REGISTRIES[section]
    if name is None:
        return "\n".join(_summary(registry.declared(each)) for each in sorted(registry.names()))
    spec = registry.declared(name)
    return f"{_summary(spec)}\n\n{textwrap.indent(inspect.getdoc(spec.fn) or '', '  ')}"


def _section_pages(schema: type[Section]) -> Iterator[tuple[str, str]]:
    for name, found in itertools.groupby(sections(schema), key=lambda each: each[0]):
        members = list(dict.fromkeys(section for _, section in found))
        if is_choice(members):
            lines = _choice_lines(name, members)
        else:
            lines = [line for section in members for line in _section_lines(name, section)]
        yield name, "\n".join(line for line in lines if line.strip())


def _section_lines(name: str, section: Schema) -> list[str]:
    lines = [f"{name}: {_first_line(section)}" if name else _first_line(section)]
    for key in section.model_fields:
        lines += _key_lines(name, key, section)
    return lines


def _choice_lines(name: str, members: Sequence[Schema]) -> list[str]:
    """The names to choose from, the keys that all of them have, then those of some."""
    names = [choice_name(each) for each in members]
    lines = [f"{name}: {_first_line(members[0].__bases__[0])}"]
    lines.append(f"  {name}.name  {' | '.join(names)}, default {names[0]}")
    lines += [
        _wrapped(f"{n}: {' '.join((inspect.getdoc(m) or '').split())}", "      ")
        for n, m in zip(names, members, strict=True)
    ]
    owners: dict[tuple[str, ...], dict[str, Schema]] = {}
    for key, section in {key: each for each in members for key in each.model_fields}.items():
        having = tuple(
            n for n, each in zip(names, members, strict=True) if key in each.model_fields
        )
        owners.setdefault(having, {})[key] = section
    for having, keys in sorted(owners.items(), key=lambda item: -len(item[0])):
        if len(having) < len(members):
            lines.append(f"  with {name}.name = {' | '.join(having)}:")
        for key, section in keys.items():
            lines += _key_lines(name, key, section) if key != "name" else []
    return lines


def _key_lines(name: str, key: str, section: Schema) -> list[str]:
    field = section.model_fields[key]
    dotted = f"{name}.{key}".lstrip(".")
    return [f"  {dotted}  {_kind(field)}", _wrapped(field.description or "", "      ")]


def _summary(spec: Spec) -> str:
    parameters = [
        f"{key} (required)" if default is ... else f"{key}={show_value(default)}"
        for key, (_, default) in spec.fields.items()
    ]
    traits = "; ".join([*_traits(spec), spec.source])
    return f"{spec.name}  {', '.join(parameters)}\n    {traits}"


def _traits(spec: Spec) -> list[str]:
    """What a recipe that names this entry must know of it, a phrase each."""
    if isinstance(spec, ObjectiveSpec):
        needs = ", ".join(sorted(need.value for need in spec.needs)) or Need.PAIRS.value
        when = [f"{need.value} if {key} > 0" for key, need in spec.needs_when.items()]
        credit = [f"credit {spec.credit} on rollouts"] if spec.credit else []
        return [", ".join([f"needs {needs}", *when]), *credit]
    if isinstance(spec, CreditSpec):
        gives = ", ".join(sorted(need.value for need in spec.gives)) or "no labels"
        offline = ["takes the data set's own response"] if spec.needs_offline else []
        return [f"gives {gives}", *offline]
    if isinstance(spec, SignalSpec) and spec.needs_fields:
        return [f"reads the columns named by {', '.join(spec.needs_fields)}"]
    return []


def _kind(field: FieldInfo) -> str:
    """``number > 0 | null, default 1.0``: type, bound and default of a key."""
    kind = _type_name(field.annotation, _bounds(field.metadata))
    if field.is_required():
        return f"{kind}, required"
    default = field.get_default(call_default_factory=True)
    if default is None or default == () or isinstance(default, Section):
        return kind
    return f"{kind}, default {default if isinstance(default, str) else show_value(default)}"


def _type_name(annotation: Any, bounds: str = "", plural: bool = False) -> str:
    """The type as a reader of YAML would put it, with its bounds; ``plural``: of several."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        return f"list of {_type_name(arguments[0], plural=True)}"
    if origin is typing.Annotated:
        return _type_name(arguments[0], _bounds(arguments[1:]) or bounds, plural)
    if arguments and origin is not dict:  # X | None, or a choice of sections
        parts = ["null" if a is type(None) else _type_name(a, bounds, plural) for a in arguments]
        return " | ".join(dict.fromkeys(parts))
    names = {int: "whole number", float: "number", str: "text"}
    if annotation is bool:
        return "true | false"
    name = names.get(annotation, "section")
    ending = "s" if plural and name != "text" else ""
    return f"{name}{ending} {bounds}".strip()


def _bounds(metadata: Iterable[Any]) -> str:
    """``>= 0 < 1`` of pydantic or annotated_types constraints."""
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    items = [part for item in metadata for part in getattr(item, "metadata", None) or [item]]
    found = [
        f"{sign} {getattr(item, name):g}"
        for item in items
        for name, sign in signs
        if getattr(item, name, None) is not None
    ]
    return " ".join(found)


def _first_line(section: type) -> str:
    return (inspect.getdoc(section) or "").splitlines()[0]


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), _WIDTH, initial_indent=indent, subsequent_indent=indent
    )
