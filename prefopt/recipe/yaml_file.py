"""YAML reading that remembers where each key was written, so that an error can say so.

Duplicate keys are refused, ``1e-6`` is a float, and ``section.key=value`` overrides are applied here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import ConfigError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A recipe as written: plain values, where each key stands, and what is already wrong with it."""

    raw: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """Key path -> ``line 12`` or ``override``."""
    problems: tuple[str, ...] = ()

    def origin(self, path: KeyPath) -> str:
        """``line 12: `` of the innermost enclosing key that was written, else an empty string."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return f"{self.origins[path[:end]]}: "
        return ""


class _Loader(yaml.SafeLoader):
    """SafeLoader whose floats follow YAML 1.2: PyYAML reads ``1e-6`` as a string."""


# PyYAML takes the first resolver that matches, and its integer resolver comes before this one: plain
# integers stay integers.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Document:
    """Returns the mapping of a YAML file with the line of every key; duplicate keys become problems.

    Raises: ConfigError for a missing or unreadable file, a syntax error (with its line), or a file
    that is not a mapping: nothing else can be said about those.
    """
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                "a recipe is a mapping of sections (model:, data:, train:, …)", source=source
            )
        raw = yaml.load(text, Loader=_Loader)
    except FileNotFoundError as error:
        raise ConfigError("no such file; give the path of a YAML recipe", source=source) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", source=source) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {_one_line(error)}", source=source) from error
    origins: dict[KeyPath, str] = {}
    duplicates: list[str] = []
    _collect_origins(node, (), origins, duplicates)
    return Document(raw, origins, tuple(duplicates))


def apply_overrides(document: Document, overrides: Iterable[str]) -> Document:
    """Returns ``document`` with ``section.key=value`` overrides applied; values are read as YAML.

    A number addresses a list item: ``data.train.0.path=pairs.jsonl``; ``null`` takes a value away.
    An override that does not parse, or that points into a value, becomes a problem.
    """
    raw = _copy(document.raw)
    origins = dict(document.origins)
    problems = list(document.problems)
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(
                f"override {item!r}: must be section.key=value, e.g. train.learning_rate=8e-7"
            )
            continue
        try:
            path = _assign(raw, key.split("."), yaml.load(value, Loader=_Loader))
        except (LookupError, TypeError, yaml.YAMLError) as error:
            problems.append(f"override {item!r}: {_one_line(error)}")
        else:
            origins = {at: where for at, where in origins.items() if at[: len(path)] != path}
            origins[path] = "override"
    return Document(raw, origins, tuple(problems))


def _assign(target: Any, parts: list[str], value: Any) -> KeyPath:
    """Sets ``value`` at the dotted key, making sections on the way; returns the key path it set."""
    path: list[str | int] = []
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        if isinstance(target, list):
            key: Any = _list_index(part, target, where)
        elif isinstance(target, dict):
            key = part
        else:
            raise TypeError(f"{where} is a value, not a section")
        path.append(key)
        if depth == len(parts) - 1:
            target[key] = value
        elif isinstance(target, dict) and target.get(key) is None:
            target[key] = {}
            target = target[key]
        else:
            target = target[key]
    return tuple(path)


def _list_index(part: str, items: list[Any], where: str) -> int:
    if not part.isdigit():
        raise LookupError(f"{where} is a list; address an item by its number, e.g. {where}.0")
    if int(part) >= len(items):
        raise LookupError(f"{where} has {len(items)} item(s), numbered from 0")
    return int(part)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _collect_origins(
    node: yaml.Node, path: KeyPath, origins: dict[KeyPath, str], duplicates: list[str]
) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                where = ".".join(map(str, (*path, key)))
                duplicates.append(
                    f"{where}: given twice, on lines {seen[key]} and {line}; keep one"
                )
            seen[key] = line
            origins[(*path, key)] = f"line {line}"
            _collect_origins(value_node, (*path, key), origins, duplicates)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[(*path, index)] = f"line {item.start_mark.line + 1}"
            _collect_origins(item, (*path, index), origins, duplicates)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
