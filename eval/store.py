"""Append-only files of what an evaluation has done: a kill loses at most the line being written.

The first line says what the records depend on; a store of anything else is refused, never mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError
from prefopt.storage.cache import writing
from prefopt.storage.reading import log_rows, mend_end

_ADVICE = "Delete the file to do this part again"


class Store:
    """JSON records by ``id`` in one file, all held in memory.

    Args:
        path: the file; made with its folder where it is not there.
        basis: what the records depend on, flat JSON. A file made on another basis is refused.

    Raises: ConfigError naming every difference of basis; DataError for a broken line before the last.
    """

    def __init__(self, path: Path, basis: Mapping[str, Any]) -> None:
        self.path = path
        self._records: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._load(dict(basis))
        self._file = path.open("ab")
        if self._file.tell() == 0:
            self._append([{"basis": dict(basis)}])

    def __contains__(self, id_: str) -> bool:
        return id_ in self._records

    def __getitem__(self, id_: str) -> dict[str, Any]:
        return self._records[id_]

    def __len__(self) -> int:
        return len(self._records)

    def values(self) -> Iterator[dict[str, Any]]:
        """All records, oldest first."""
        return iter(self._records.values())

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends records with an ``id`` that is not there yet, and has them on disk when it returns.

        Raises: DataError if the disk is full or the file cannot be written.
        """
        new = [dict(record) for record in records if record["id"] not in self._records]
        self._append(new)
        self._records |= {record["id"]: record for record in new}

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, records: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with writing(self.path):
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def _load(self, basis: dict[str, Any]) -> None:
        if not self.path.is_file():
            return
        mend_end(self.path, "it is done again")
        rows = log_rows(self.path, {"id": str}, _ADVICE, first={"basis": dict})
        for number, record in enumerate(rows):
            if number:
                self._records[record["id"]] = record
            else:
                self._check(record["basis"], basis)

    def _check(self, found: Mapping[str, Any], basis: Mapping[str, Any]) -> None:
        basis = json.loads(json.dumps(basis))  # tuples are lists in a file
        changed = [
            f"{key} was {_short(found.get(key))} and is now {_short(basis.get(key))}"
            for key in sorted(found.keys() | basis.keys())
            if found.get(key) != basis.get(key)
        ]
        if changed:
            raise ConfigError(
                [
                    f"{self.path} was made differently: {change}. Take another --output, or delete that file "
                    "to do this part again"
                    for change in changed
                ]
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
