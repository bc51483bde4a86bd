"""Rows of a benchmark's files: a path the user gives, a file of an installed package, or a hub data set."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prefopt.data.readers import RawRow, read_rows
from prefopt.data.sources import open_source, sound_rows
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.load import validated
from prefopt.recipe.local_paths import data_suffix
from prefopt.recipe.schema import SourceSection


def benchmark_rows(
    option: str,
    path: str | None,
    *,
    hub: str | None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> list[RawRow]:
    """The rows of ``path``, else of the hub data set ``hub``.

    Args:
        option: what the user sets to give a file, e.g. ``tasks.gsm8k.data``; named in errors.
        path: local file, directory or glob (json, jsonl, csv, parquet; .gz too), or None.
        hub: id of the hub data set; None where there is none, so that ``path`` is required.

    Raises: ConfigError if there is no path and no hub data set, or the hub cannot be reached; DataError for
        a broken file, naming file and line.
    """
    if path is not None:
        return _rows(source_at(option, path=path))
    if hub is None:
        raise ConfigError(f"{option} is missing: the path of the file with its examples")
    section = source_at(option, path=hub, split=split, subset=subset, revision=revision)
    try:
        return _rows(section)
    except (DataError, ConfigError) as error:
        raise ConfigError(
            f"the hub data set {hub} is not to be had ({error}). Give a file: {option}=PATH"
        ) from error


def source_at(option: str, **keys: Any) -> SourceSection:
    """The source that an option names. Raises: ConfigError, naming it, for what is none."""
    found = validated(SourceSection, keys, place=tuple(option.split(".")))
    if found.value is None:
        raise ConfigError(found.problems)
    return found.value


def _rows(section: SourceSection) -> list[RawRow]:
    return list(sound_rows(open_source(section).rows()))


def file_rows(path: Path) -> list[RawRow]:
    """The rows of one local file. Raises: DataError naming file and line."""
    if not path.is_file():
        raise DataError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    if data_suffix(path) is None:
        raise DataError(f"{path}: must be a .json, .jsonl, .csv (each also .gz) or .parquet file")
    return list(sound_rows(read_rows(path, path.name)))


def keyed(
    rows: Iterable[RawRow], key: Callable[[dict[str, Any]], Any], what: str, *names: str
) -> dict[str, RawRow]:
    """``{key: row}`` in file order.

    Args:
        key: of a row's data; None or empty for a row that has none.
        what: such a row is called.
        names: the columns that ``key`` reads, any of which identifies the row.

    Raises: DataError for a row without a key, or two rows with one (both lines named).
    """
    found: dict[str, RawRow] = {}
    for row in rows:
        value = key(row.data)
        if value is None or value == "":
            wanted = " or ".join(map(repr, names)) or "a column of that name"
            raise DataError(
                f"{row.where}: this {what} has no key: {wanted} is missing or empty; its columns: {columns(row)}"
            )
        if str(value) in found:
            raise DataError(
                f"{row.where}: a second {what} with key {str(value)[:80]!r}; the first is at "
                f"{found[str(value)].where}. Keep one of them"
            )
        found[str(value)] = row
    return found


def require(row: RawRow, *names: str) -> Any:
    """The value of the first of ``names`` that is there and not null. Raises: DataError naming the columns."""
    for name in names:
        if row.data.get(name) is not None:
            return row.data[name]
    wanted = " or ".join(map(repr, names))
    raise DataError(
        f"{row.where}: column {wanted} is missing or empty; its columns: {columns(row)}"
    )


def columns(row: RawRow) -> str:
    """The names of a row's columns, for errors."""
    return ", ".join(map(str, row.data)) or "none"


def text_key(text: str) -> str:
    """A key made of a text: for benchmarks whose examples have no id. 16 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def package_file(package: str, *parts: str) -> Path | None:
    """A file or folder inside an installed package, without importing it; None if it is not there."""
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        if (found := Path(root).joinpath(*parts)).exists():
            return found
    return None


def file_or_hub_rows(option: str, path: str | None, *, repo: str, file: str) -> list[RawRow]:
    """The rows of ``path``, else of one file of the hub data set ``repo``.

    Args:
        option: what the user sets to give a file, e.g. ``tasks.arena_hard.data``; named in errors.
        path: local file, directory or glob, or None.
        repo: id of the hub data set.
        file: path in it.

    Raises: ConfigError if the hub's file is not to be had; DataError for a broken file, naming file and line.
    """
    if path is not None:
        return benchmark_rows(option, path, hub=None)
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(repo, file, repo_type="dataset")
    except (OSError, ValueError) as error:  # HfHubHTTPError is an OSError
        raise ConfigError(
            f"{file} of the hub data set {repo} is not to be had ({error}). Give a file: {option}=PATH"
        ) from error
    return file_rows(Path(found))
