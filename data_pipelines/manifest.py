"""What was made of what: sealed records of stages and shards. A record that was edited by hand is refused."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError
from prefopt.storage.cache import write_whole
from prefopt.storage.reading import Kind, as_object, load_json, reading, sealed, unsealed


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a sealed record, whole or not at all. Raises: DataError if it cannot be written."""
    text = json.dumps(sealed(record), ensure_ascii=False, indent=1) + "\n"
    write_whole(path, text)


def read_record(path: Path, keys: Mapping[str, Kind] = {}) -> dict[str, Any] | None:
    """The record without its seal; None where there is none.

    Args:
        keys: what a record of this kind holds (`prefopt.storage.reading.as_object`).

    Raises: DataError for one that is broken, was edited, or that another version wrote with other keys.
    """
    if not path.is_file():
        return None
    with reading(path, "a record of a pipeline", REPAIR):
        return as_object(unsealed(load_json(path)), keys)


REPAIR = "Restore it, or make the stage again with --from and its name"


@dataclass(frozen=True)
class Change:
    """One difference between what a stage was made of and what it would be made of now."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {_short(self.was)} and is now {_short(self.now)}"


def changes(was: Any, now: Any, key: str = "") -> list[Change]:
    """Every difference of two JSON values, named by dotted keys."""
    if isinstance(was, dict) and isinstance(now, dict):
        found: list[Change] = []
        for name in sorted(was.keys() | now.keys()):
            found += changes(was.get(name), now.get(name), f"{key}.{name}".lstrip("."))
        return found
    return [] if was == now else [Change(key, was, now)]


def code_hash(thing: Any) -> str:
    """Hash of the module that defines ``thing``: of what it does, not of its comments, docstrings or layout.

    Imports do not count either: a module that moves changes those of many, and what none of them does.

    Raises: ConfigError for something defined in no file.
    """
    module = sys.modules.get(getattr(thing, "__module__", ""))
    file = getattr(module, "__file__", None)
    if file is None:
        raise ConfigError(f"{thing!r}: is defined in no file, so what it does cannot be recorded")
    tree = ast.parse(Path(inspect.getsourcefile(thing) or file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [each for each in body if not _does_nothing(each)]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _does_nothing(node: ast.AST) -> bool:
    """An import, or a docstring of a module, a function or an attribute."""
    value = getattr(node, "value", None)
    text = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.Expr) and text)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
