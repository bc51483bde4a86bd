"""The pages of ``prefopt keys|objectives|credits|signals``, made from the schema and the registries.

Nothing is described here: a key's text is the docstring under its field, a function's is its own.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic.fields import FieldInfo

from prefopt.errors import ConfigError, suggest
from prefopt.recipe.explain import sections, show_value
from prefopt.recipe.registry import REGISTRIES, CreditSpec, Need, ObjectiveSpec, SignalSpec, Spec
from prefopt.recipe.schema import Recipe, Section

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
        return "\n".join(_summary(registry.get(each)) for each in sorted(registry.names()))
    spec = registry.get(name)
    return f"{_summary(spec)}\n\n{textwrap.indent(inspect.getdoc(spec.fn) or '', '  ')}"


def _section_pages(schema: type[Section]) -> Iterator[tuple[str, str]]:
    for name, section in sections(schema):
        lines = [f"{name}: {_first_line(section)}" if name else _first_line(section)]
        for key, field in section.model_fields.items():
            dotted = f"{name}.{key}".lstrip(".")
            lines.append(f"  {dotted}  {_kind(field)}")
            lines.append(_wrapped(field.description or "", "      "))
        yield name, "\n".join(line for line in lines if line.strip())


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


def _type_name(annotation: Any, bounds: str = "") -> str:
    """The type as a reader of YAML would put it, with its bounds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}s"
    if origin is typing.Annotated:
        return _type_name(arguments[0], _bounds(arguments[1:]))
    if arguments and origin is not dict:  # X | None
        return " | ".join("null" if a is type(None) else _type_name(a, bounds) for a in arguments)
    names = {int: "whole number", float: "number", bool: "true | false", str: "text"}
    return f"{names.get(annotation, 'section')} {bounds}".strip()


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
