"""Shards: files of rows that come into being whole or not at all, and are checked whenever they are read."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from data_pipelines.parquet_shards import common_schema, parquet_bytes, without_nulls
from data_pipelines.rows import Row
from prefopt.errors import DataError
from prefopt.storage.cache import write_whole
from prefopt.storage.json_text import not_json

_Item = TypeVar("_Item")
_ENCODE = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False
).encode  # json.dumps makes one a call


@dataclass(frozen=True)
class ShardFile:
    """One shard as its record has it."""

    path: Path
    rows: int
    sha256: str


def shard_name(number: int) -> str:
    """Of a shard as it is made."""
    return f"{number:05d}.jsonl"


def write_shard(path: Path, rows: Sequence[Row]) -> ShardFile:
    """Writes ``rows`` as JSON lines, in a folder that is named after its stage. Equal rows give equal bytes.

    Raises: DataError if the disk is full, or naming the row that no JSON can hold.
    """
    return _write(path, len(rows), _lines(path, rows))


def write_parquet(parts: Sequence[ShardFile], folder: Path) -> list[ShardFile]:
    """Shards of JSON lines as Parquet in ``folder``, under the same names and in one schema.

    Raises: DataError if the disk is full, or naming the row that does not go with the others.
    """
    schema = common_schema((read_shard(part) for part in parts), folder.name)
    return [
        _write(
            folder / f"{part.path.stem}.parquet",
            part.rows,
            parquet_bytes(read_shard(part), schema, folder.name),
        )
        for part in parts
    ]


def _write(path: Path, rows: int, data: bytes) -> ShardFile:
    write_whole(path, data)
    return ShardFile(path, rows, hashlib.sha256(data).hexdigest())


def read_shard(shard: ShardFile) -> list[Row]:
    """The rows of a shard.

    Raises: DataError if the file is not there, or not what its record says.
    """
    try:
        data = shard.path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{shard.path}: cannot be read: {error.strerror or error}. Its record says it was written; restore "
            f"it, or make it again with --from {shard.path.parent.name}"
        ) from error
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise DataError(
            f"{shard.path}: was changed since it was written (its checksum differs). Restore it, or make it again "
            f"with --from {shard.path.parent.name}"
        )
    return _decode(shard.path, data)


class Shards:
    """Complete shards in order: the output of a stage, as the next one reads it."""

    def __init__(self, files: Sequence[ShardFile]) -> None:
        self.files = tuple(files)

    @property
    def num_rows(self) -> int:
        return sum(file.rows for file in self.files)

    def rows(self) -> Iterator[Row]:
        """All rows in order, one shard in memory at a time. Raises: DataError as `read_shard`."""
        for file in self.files:
            yield from read_shard(file)


def in_shards(rows: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """``rows`` cut into lists of ``size``; the last may be shorter."""
    left = iter(rows)
    while batch := list(islice(left, size)):
        yield batch


def _lines(path: Path, rows: Sequence[Row]) -> bytes:
    lines = []
    for row in rows:
        try:
            lines.append(f"{_ENCODE(row)}\n".encode())
        except (ValueError, TypeError, RecursionError) as error:
            where = f"stage {path.parent.name!r}, row {row.get('id')!a}"
            raise DataError(
                f"{where}: column {not_json(row) or error}, and a shard's rows are JSON"
            ) from error
    return b"".join(lines)


def _decode(path: Path, data: bytes) -> list[Row]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in data.decode("utf-8").split("\n") if line]
    import pyarrow.parquet

    return [without_nulls(row) for row in pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()]
