"""Rows of one local file: JSON, JSON lines, CSV (each also gzipped) and Parquet, as plain dicts.

Every reader streams, names file and line of what it cannot read, and repairs nothing. What is wrong with a file
is an error; what is wrong with the text of a row that was read (``RawRow.flaw``) is for whoever counts rejects.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from prefopt.data.opening import check_kind, open_bytes
from prefopt.errors import DataError
from prefopt.recipe.local_paths import data_suffix
from prefopt.storage.json_text import (
    BadJson,
    half_surrogate,
    may_hold_halves,
    parse_items,
    parse_json,
)

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
    flaw: str | None = None
    """Why no encoding can write the row's text, with its column; `canonical` and `prompt_row` refuse the row."""
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
        for found in reader(path):
            filled = suffix == ".parquet"
            yield RawRow(name, found.number, found.data, found.flaw, filled_nulls=filled)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the gzip archive is damaged or cut off ({error}); fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def count_rows(path: Path) -> int | None:
    """Rows of ``path`` for a progress bar: exact for Parquet, lines for JSON lines and CSV, None for JSON."""
    suffix = data_suffix(path)
    if suffix == ".json":
        return None
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_metadata(path).num_rows
        with open_bytes(path) as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except (OSError, ValueError, EOFError, zlib.error, DataError):
        return None  # reading the rows will say what is wrong, and where


@dataclass(frozen=True)
class _Found:
    """One row, before it is known under which name its file goes."""

    number: int
    data: dict[str, Any]
    flaw: str | None = None


def _read_json(path: Path) -> Iterator[_Found]:
    """A JSON array of objects; a ``.json`` file that holds JSON lines is read as those."""
    with open_bytes(path) as file:
        head = _first_byte(file)
    if head != b"[":
        yield from _read_jsonl(path)
        return
    with open_bytes(path) as file:
        text = _decode(file.read().removeprefix(_BOM), path)
    number, halves = 0, may_hold_halves(text)
    try:
        for number, item in enumerate(parse_items(text), 1):
            row = _object(item, f"{path}, row {number}")
            yield _Found(number, row, _flaw(row) if halves else None)
    except BadJson as error:
        raise DataError(_broken_array(path, number + 1, text, error)) from error


def _read_jsonl(path: Path) -> Iterator[_Found]:
    with open_bytes(path) as file:
        # Binary lines end at \n alone: text mode would also split at a bare \r within a string.
        for number, line in enumerate(file, 1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if not line.strip():
                continue
            text = _decode(line, path, number)
            try:
                item = parse_json(text)
            except BadJson as error:
                raise DataError(_broken_line(path, number, text, error)) from error
            row = _object(item, f"{path}:{number}")
            yield _Found(number, row, _flaw(row) if may_hold_halves(text) else None)


def _read_csv(path: Path) -> Iterator[_Found]:
    csv.field_size_limit(_CSV_FIELD_BYTES)
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, [])
            _check_header(path, header)
            for cells in reader:
                if cells:
                    _check_width(path, reader.line_num, cells, header)
                    yield _Found(reader.line_num, dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: broken CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 after line {reader.line_num} ({error.reason}); "
                "convert the file, e.g. with iconv -f LATIN1 -t UTF-8"
            ) from error


def _read_parquet(path: Path) -> Iterator[_Found]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as head:
        check_kind(path, head.read(64))
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for number, row in enumerate(
                arrow_rows(file.iter_batches(batch_size=_PARQUET_ROWS), str(path)), 1
            ):
                yield _Found(number, row)
    except (
        pyarrow.ArrowException,
        UnicodeDecodeError,
    ) as error:  # names of columns, too, may be damaged
        raise DataError(_no_parquet(path, error)) from error
    except OSError as error:  # also what Arrow raises for a page that does not decompress
        if error.errno is not None:
            raise
        raise DataError(_no_parquet(path, error)) from error


def arrow_rows(batches: Iterable[Any], name: str) -> Iterator[dict[str, Any]]:
    """The rows of Arrow batches or tables, as dicts.

    Raises: DataError naming the row that Python cannot hold: text that is not UTF-8, a date beyond year 9999.
    """
    before = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except _NOT_PYTHON:
            rows = _one_by_one(batch, name, before)
        yield from rows
        before += batch.num_rows


# Of text, dates and time zones; ArrowException is not among them: it is the file that is damaged.
_NOT_PYTHON = (ValueError, OverflowError, KeyError)


def _one_by_one(batch: Any, name: str, before: int) -> Iterator[dict[str, Any]]:
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except _NOT_PYTHON as error:
            raise DataError(
                f"{name}, row {before + index + 1}: holds a value that cannot be read ({error}); mend or remove it"
            ) from error


def _no_parquet(path: Path, error: Exception) -> str:
    return f"{path}: not a readable Parquet file, or one that was cut off: {' '.join(str(error).split())}"


READERS: dict[str, Callable[[Path], Iterator[_Found]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


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


def _flaw(row: dict[str, Any]) -> str | None:
    place = half_surrogate(row)
    return None if place is None else f"column {place!r} holds half of a surrogate pair"


def _broken_line(path: Path, number: int, text: str, error: BadJson) -> str:
    hint = ""
    if number == 1 and text.strip() == "{":
        hint = "; a .json file holds an array of objects, or one object a line"
    return f"{path}:{number}: broken JSON: {_reason(text, error, 0)}{hint}"


def _broken_array(path: Path, number: int, text: str, error: BadJson) -> str:
    if error.position is None:
        return f"{path}, row {number}: broken JSON: {error}"
    line = text.count("\n", 0, error.position) + 1
    start = text.rfind("\n", 0, error.position) + 1
    return f"{path}:{line}: broken JSON in row {number}: {_reason(text, error, start)}"


def _reason(text: str, error: BadJson, line_start: int) -> str:
    """What is wrong, with its column and what stands there, where that is known."""
    if error.position is None:
        return str(error)
    around = text[max(line_start, error.position - 20) : error.position + 20].strip("\n")
    return f"{error} (column {error.position - line_start + 1}, at {around!r})"


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
