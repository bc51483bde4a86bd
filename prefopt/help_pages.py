"""The pages of ``prefopt keys`` and ``prefopt objectives``, made from the schema and the registry.

Nothing is described here: a key's text is the docstring under its field, an objective's is its own.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic.fields import FieldInfo

from prefopt.config.explain import sections, show_value
from prefopt.config.schema import Section
from prefopt.errors import ConfigError, suggest
from prefopt.registry import Need, get_objective, objective_names

_WIDTH = 96


def keys_page(only: str | None = None) -> str:
    """Every key of every section, or of one section (``train``, ``data.train.N``), as text.

    Raises: ConfigError for a section there is none of.
    """
    pages = {name: page for name, page in _section_pages() if page}
    if only is None:
        return "\n\n".join(pages.values())
    wanted = re.sub(r"\.\d+", ".N", only)
    found = [
        page for name, page in pages.items() if name == wanted or name.startswith(f"{wanted}.")
    ]
    if not found:
        raise ConfigError(f"{only!r} is not a section; {suggest(wanted, [n for n in pages if n])}")
    return "\n\n".join(found)


def objectives_page(name: str | None = None) -> str:
    """A line or two an objective, or one objective with its documentation.

    Raises: ConfigError for an unknown name.
    """
    if name is None:
        return "\n".join(_objective_summary(each) for each in sorted(objective_names()))
    spec = get_objective(name)
    return f"{_objective_summary(name)}\n\n{textwrap.indent(inspect.getdoc(spec.fn) or '', '  ')}"


def _section_pages() -> Iterator[tuple[str, str]]:
    for name, section in sections():
        lines = [f"{name}: {_first_line(section)}" if name else _first_line(section)]
        for key, field in section.model_fields.items():
            dotted = f"{name}.{key}".lstrip(".")
            lines.append(f"  {dotted}  {_kind(field)}")
            lines.append(_wrapped(field.description or "", "      "))
        yield name, "\n".join(line for line in lines if line.strip())


def _objective_summary(name: str) -> str:
    spec = get_objective(name)
    parameters = [
        f"{key} (required)" if default is ... else f"{key}={show_value(default)}"
        for key, (_, default) in spec.fields.items()
    ]
    needs = ", ".join(sorted(need.value for need in spec.needs)) or Need.PAIRS.value
    return f"{name}  {', '.join(parameters)}\n    needs {needs}; {spec.source}"


def _kind(field: FieldInfo) -> str:
    """``number > 0 | null, default 1.0``: type, bound and default of a key."""
    kind = _type_name(field.annotation, _bounds(field.metadata))
    if field.is_required():
        return f"{kind}, required"
    default = field.default
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
