"""Rows of one local file: JSON, JSON lines, CSV (each also gzipped) and Parquet, as plain dicts.

Every reader streams, names file and line of what it cannot read, and repairs nothing.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from prefopt.errors import DataError

_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 512
"""Rows decoded at a time: a row of a preference set is kilobytes, a row group may be gigabytes."""
_CSV_FIELD_BYTES = 1 << 30
"""The csv module stops at 128 KiB a field; a long response is longer."""


@dataclass(frozen=True)
class RawRow:
    """One row as its file holds it. ``number`` is the line for JSON lines and CSV, else the row; from 1."""

    file: str
    number: int
    data: dict[str, Any]
    filled_nulls: bool = False
    """Whether its format gives every object the keys of all others (Parquet): a null may be no key at all."""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


def read_rows(path: Path, name: str) -> Iterator[RawRow]:
    """Rows of ``path`` in file order, labelled ``name``.

    Raises: DataError naming file and line: broken JSON, a row that is no object, not UTF-8, a damaged
        archive, an unreadable file.
    """
    suffix = str(data_suffix(path))
    reader = READERS[suffix]
    try:
        for number, data in reader(path):
            yield RawRow(name, number, data, suffix == ".parquet")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the gzip archive is damaged or cut off ({error}); fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def data_suffix(path: str | Path) -> str | None:
    """``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` (``.gz`` looked through); None for anything else."""
    name = str(path).lower()
    gzipped = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    known = suffix in READERS and not (gzipped and suffix == ".parquet")
    return suffix if known else None


def count_rows(path: Path) -> int | None:
    """Rows of ``path`` for a progress bar: exact for Parquet, lines for JSON lines and CSV, None for JSON."""
    suffix = data_suffix(path)
    if suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    if suffix == ".json":
        return None
    try:
        with _open(path) as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except (OSError, EOFError, zlib.error):
        return None  # reading the rows will say what is wrong, and where


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """A JSON array of objects; a ``.json`` file that holds JSON lines is read as those."""
    with _open(path) as file:
        head = _first_byte(file)
    if head != b"[":
        yield from _read_jsonl(path)
        return
    with _open(path) as file:
        text = _decode(file.read().removeprefix(_BOM), path)
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: broken JSON: {error.msg} (column {error.colno})"
        ) from error
    for number, item in enumerate(items, 1):
        yield number, _object(item, f"{path}, row {number}")


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open(path) as file:
        # Binary lines end at \n alone: text mode would also split at a bare \r within a string.
        for number, line in enumerate(file, 1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if not line.strip():
                continue
            text = _decode(line, path, number)
            try:
                item = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(_broken_line(path, number, text, error)) from error
            yield number, _object(item, f"{path}:{number}")


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_CSV_FIELD_BYTES)
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, [])
            _check_header(path, header)
            for cells in reader:
                if cells:
                    _check_width(path, reader.line_num, cells, header)
                    yield reader.line_num, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: broken CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 after line {reader.line_num} ({error.reason}); "
                "convert the file, e.g. with iconv -f LATIN1 -t UTF-8"
            ) from error


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=_PARQUET_ROWS)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def _first_byte(file: IO[bytes]) -> bytes:
    """The first byte that is neither white space nor byte-order mark."""
    while block := file.read(4096):
        if stripped := block.removeprefix(_BOM).lstrip():
            return stripped[:1]
    return b""


def _decode(data: bytes, path: Path, line: int | None = None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = line or data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 ({error.reason} 0x{data[error.start]:02x}); "
            "convert the file, e.g. with iconv -f LATIN1 -t UTF-8"
        ) from error


def _object(item: Any, where: str) -> dict[str, Any]:
    if isinstance(item, dict):
        return item
    raise DataError(
        f"{where}: a row must be an object with named columns, this is {_json_type(item)}; "
        'write {"prompt": …, "chosen": …, "rejected": …}'
    )


def _json_type(item: Any) -> str:
    if isinstance(item, list):
        return f"an array of {len(item)}"
    return {str: "a string", bool: "a boolean", type(None): "null"}.get(type(item), "a number")


def _broken_line(path: Path, number: int, text: str, error: json.JSONDecodeError) -> str:
    around = text[max(0, error.pos - 20) : error.pos + 20].strip("\n")
    hint = ""
    if number == 1 and text.strip() == "{":
        hint = "; a .json file holds an array of objects, or one object a line"
    return f"{path}:{number}: broken JSON: {error.msg} (column {error.colno}, at {around!r}){hint}"


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: the header names a column twice: {', '.join(twice)}")


def _check_width(path: Path, line: int, cells: list[str], header: list[str]) -> None:
    if len(cells) != len(header):
        raise DataError(
            f"{path}:{line}: {len(cells)} fields, but the header names {len(header)} "
            f"({', '.join(header)}); quote fields that hold commas"
        )
