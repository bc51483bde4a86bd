"""What was made of what: sealed records of stages and shards. A record that was edited by hand is refused."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError
from prefopt.storage.cache import write_whole
from prefopt.storage.code import code_hash as source_hash
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
    """Hash of what the module that defines ``thing`` does; see `prefopt.storage.code`.

    Raises: ConfigError for something defined in no file.
    """
    module = sys.modules.get(getattr(thing, "__module__", ""))
    file = getattr(module, "__file__", None)
    if file is None:
        raise ConfigError(f"{thing!r}: is defined in no file, so what it does cannot be recorded")
    return source_hash(Path(inspect.getsourcefile(thing) or file))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
