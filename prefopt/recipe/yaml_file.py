"""YAML reading that remembers where each key was written, so that an error can say so.

``section.key=value`` overrides are applied here; what a value is, in a file or after an equals sign, is decided in
`prefopt.recipe.yaml_values`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError
from prefopt.recipe.yaml_values import KeyPath, is_text, one_line, parse_yaml

_SHOWN = 200
_MOST_DIGITS = 10


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


def read_yaml(path: Path) -> Document:
    """Returns the mapping of a YAML file with the line of every key; duplicate keys become problems.

    Raises: ConfigError for a missing or unreadable file, a syntax error (with its line), or a file
    that is not a mapping: nothing else can be said about those.
    """
    source = str(path)
    try:
        found = parse_yaml(_text(path))
    except ConfigError as error:
        raise ConfigError(error.problems, source=source) from error
    if not isinstance(found.raw, dict):
        raise ConfigError(
            "a recipe is a mapping of sections (model:, data:, train:, …)", source=source
        )
    return Document(found.raw, found.origins, tuple(found.problems))


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError("no such file; give the path of a YAML recipe") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"cannot be read: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"line {line}: cannot be read: not UTF-8 ({error.reason} 0x{data[error.start]:02x}); convert the "
            "file, e.g. with iconv -f LATIN1 -t UTF-8"
        ) from error


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
        if not equals or not all(key.split(".")) or not is_text(key):
            problems.append(
                f"override {_shown(item)}: must be section.key=value, e.g. train.learning_rate=8e-7"
            )
            continue
        try:
            found = parse_yaml(value)
            path = _assign(raw, key.split("."), found.raw)
        except ConfigError as error:
            problems += [f"override {_shown(item)}: {problem}" for problem in error.problems]
        except (LookupError, TypeError) as error:
            problems.append(f"override {_shown(item)}: {one_line(error)}")
        else:
            problems += [f"override {_shown(item)}: {problem}" for problem in found.problems]
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
    if not (part.isascii() and part.isdigit() and len(part) < _MOST_DIGITS):
        raise LookupError(f"{where} is a list; address an item by its number, e.g. {where}.0")
    if int(part) >= len(items):
        raise LookupError(f"{where} has {len(items)} item(s), numbered from 0")
    return int(part)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _shown(item: str) -> str:
    return repr(item) if len(item) <= _SHOWN else f"{item[:_SHOWN]!r}…"
