"""YAML reading with line numbers: duplicate keys refused, 1e-6 a float, overrides by dotted key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import ConfigError

Lines = dict[tuple[str | int, ...], int]


class _Loader(yaml.SafeLoader):
    """SafeLoader whose floats follow YAML 1.2: PyYAML reads ``1e-6`` as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
# The YAML 1.1 integer resolver comes first and keeps plain integers integers.


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """Returns the mapping of a YAML file and the line of every key path in it.

    Raises: ConfigError for a missing file, a syntax error (with line), a duplicate key, or a non-mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError("no such file; give the path of a YAML recipe", source=str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", source=str(path)) from error
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {_one_line(error)}", source=str(path)) from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("a recipe is a mapping of sections (model:, data:, train:, …)", source=str(path))
    lines: Lines = {}
    duplicates: list[str] = []
    _collect_lines(node, (), lines, duplicates)
    if duplicates:
        raise ConfigError(duplicates, source=str(path))
    return yaml.load(text, Loader=_Loader), lines  # noqa: S506  (a SafeLoader)


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns ``raw`` with ``section.key=value`` overrides applied; values are read as YAML.

    A number addresses a list item: ``data.train.0.path=pairs.jsonl``.
    Raises: ConfigError naming every override that does not parse or points into a scalar.
    """
    result = _copy(raw)
    problems = []
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key:
            problems.append(f"override {item!r}: must be section.key=value, e.g. train.learning_rate=8e-7")
            continue
        try:
            _assign(result, key.split("."), yaml.load(value, Loader=_Loader))  # noqa: S506
        except (KeyError, IndexError, TypeError, ValueError, yaml.YAMLError) as error:
            problems.append(f"override {item!r}: {_one_line(error)}")
    if problems:
        raise ConfigError(problems)
    return result


def _assign(target: Any, path: list[str], value: Any) -> None:
    for index, part in enumerate(path):
        last = index == len(path) - 1
        if isinstance(target, list):
            position = int(part)
            if last:
                target[position] = value
                return
            target = target[position]
        elif isinstance(target, dict):
            if last:
                target[part] = value
                return
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        else:
            raise TypeError(f"{'.'.join(path[:index])} is a value, not a section")


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _collect_lines(
    node: yaml.Node, path: tuple[str | int, ...], lines: Lines, duplicates: list[str]
) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                where = ".".join(map(str, (*path, key)))
                duplicates.append(f"{where}: given twice, on lines {seen[key]} and {line}; keep one")
            seen[key] = line
            lines[(*path, key)] = line
            _collect_lines(value_node, (*path, key), lines, duplicates)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _collect_lines(item, (*path, index), lines, duplicates)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
