"""Shards: files of rows that come into being whole or not at all, and are checked whenever they are read."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from data_pipelines.rows import Row
from prefopt.errors import DataError
from prefopt.storage.cache import write_whole

Format = Literal["jsonl", "parquet"]
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


def shard_name(number: int, form: Format) -> str:
    return f"{number:05d}.{form}"


def write_shard(path: Path, rows: Sequence[Row]) -> ShardFile:
    """Writes ``rows`` in the format of the suffix. Equal rows give equal bytes.

    Raises: DataError if the disk is full, or a row cannot be a row of that format.
    """
    data = _encode(path, rows)
    write_whole(path, data)
    return ShardFile(path, len(rows), hashlib.sha256(data).hexdigest())


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


def _encode(path: Path, rows: Sequence[Row]) -> bytes:
    if path.suffix == ".jsonl":
        try:
            lines = map(_ENCODE, rows)
            return "".join(f"{line}\n" for line in lines).encode()
        except (ValueError, TypeError, UnicodeEncodeError) as error:
            raise DataError(
                f"{path}: a row is not JSON: {error} (NaN, or half a surrogate pair?)"
            ) from error
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.Table.from_pylist(list(rows))
        sink = io.BytesIO()
        pyarrow.parquet.write_table(table, sink)
    except (pyarrow.ArrowException, UnicodeEncodeError) as error:
        raise DataError(
            f"{path}: its rows have no common Parquet type ({error}). Columns of mixed types need format: jsonl"
        ) from error
    return sink.getvalue()


def _decode(path: Path, data: bytes) -> list[Row]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in data.decode("utf-8").split("\n") if line]
    import pyarrow.parquet

    return [_without_nulls(row) for row in pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()]


def _without_nulls(value: Any) -> Any:
    """A value without the keys that Parquet filled in because other rows have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
