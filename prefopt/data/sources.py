"""Where rows come from: local files or a hub data set, and the content hash that identifies them."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from prefopt.data.readers import (
    READERS,
    RawRow,
    arrow_rows,
    count_rows,
    read_rows,
)
from prefopt.errors import ConfigError, DataError, suggest
from prefopt.recipe.local_paths import data_suffix, is_local_data
from prefopt.recipe.schema import SourceSection

_HUB_ROWS = 512


class Source(Protocol):
    """Rows, and a hash that changes when they do."""

    def identity(self) -> list[str]:
        """Strings that change whenever a row would; part of the cache key."""
        ...

    def rows(self) -> Iterator[RawRow]:
        """Every row, those with a flaw too: who has no place for rejects takes `sound_rows`."""
        ...

    def num_rows(self) -> int | None:
        """About how many rows there are, for a progress bar."""
        ...


@dataclass(frozen=True)
class LocalFiles:
    """Local files in sorted order. ``names`` label their rows: unique within the source."""

    paths: tuple[Path, ...]
    names: tuple[str, ...]

    def identity(self) -> list[str]:
        return [
            f"{name}:{file_sha256(path)}" for name, path in zip(self.names, self.paths, strict=True)
        ]

    def rows(self) -> Iterator[RawRow]:
        for path, name in zip(self.paths, self.names, strict=True):
            yield from read_rows(path, name)

    def num_rows(self) -> int | None:
        counts = [count_rows(path) for path in self.paths]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None


@dataclass(frozen=True)
class HubRows:
    """One split of a `datasets.Dataset`, memory-mapped by that library."""

    name: str
    dataset: Any

    def identity(self) -> list[str]:
        return [self.name, self.dataset._fingerprint]

    def rows(self) -> Iterator[RawRow]:
        batches = self.dataset.with_format("arrow").iter(batch_size=_HUB_ROWS)
        for number, data in enumerate(arrow_rows(batches, self.name), 1):
            yield RawRow(self.name, number, data, filled_nulls=True)

    def num_rows(self) -> int | None:
        return len(self.dataset)


def open_source(section: SourceSection) -> Source:
    """The rows a source section names: local where the path exists or looks like one, else the hub's.

    Relative paths resolve against the current directory.
    Raises: DataError if nothing is there; ConfigError if hub settings are given for local files.
    """
    if not is_local_data(section.path):
        return _open_hub(section)
    given = [key for key in ("split", "subset", "revision") if getattr(section, key) is not None]
    if given:
        raise ConfigError(
            f"data: {key} = {getattr(section, key)!r}: only for hub data sets, and {section.path!r} is "
            "local; name the file of that split in path instead"
            for key in given
        )
    return _open_local(section.path)


def source_name(section: SourceSection) -> str:
    """What a source is called: its ``name``, else its file's without the ending, or its data set's."""
    last = Path(section.path).name
    if section.name:
        return section.name
    if not is_local_data(section.path) or data_suffix(last) is None:
        return last
    return last.removesuffix(".gz").rpartition(".")[0]


def first_rows(source: Source, max_rows: int | None) -> Iterator[RawRow]:
    """The first ``max_rows`` rows, or all; `canonical` and `prompt_row` refuse those with a flaw."""
    return islice(source.rows(), max_rows)


def sound_rows(rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """``rows``, for a reader that has no rejects. Raises: DataError naming file and line of one with a flaw."""
    for row in rows:
        if row.flaw is not None:
            raise DataError(
                f"{row.where}: {row.flaw}, which no file can hold. Mend or remove the row"
            )
        yield row


def file_sha256(path: Path) -> str:
    """SHA-256 of the bytes of ``path``; DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open_local(path: str) -> LocalFiles:
    root = Path(path).expanduser()
    if glob.has_magic(path) and not root.exists():
        found = sorted(Path(p) for p in glob.glob(str(root), recursive=True) if data_suffix(p))
        if not found:
            raise DataError(f"data: path = {path!r}: the pattern matches no {_known()} file")
        return _label(found)
    if root.is_dir():
        return _label(_directory(root))
    if not root.is_file():
        raise DataError(f"data: path = {path!r}: {_missing(root)}")
    if data_suffix(root) is None:
        raise DataError(f"data: path = {path!r}: cannot read this kind of file; known: {_known()}")
    return LocalFiles((root,), (_name(Path(root.name)),))


def _directory(root: Path) -> list[Path]:
    if (root / "dataset_info.json").is_file() or (root / "dataset_dict.json").is_file():
        raise DataError(
            f"data: path = {str(root)!r}: this directory was written by datasets' save_to_disk, which is "
            "not an exchange format; write Parquet instead: load_from_disk(…).to_parquet('train.parquet')"
        )
    files = [p for p in root.iterdir() if p.is_file() and not p.name.startswith(".")]
    found = sorted(p for p in files if data_suffix(p))
    if found:
        return found
    # A cloned hub repository keeps its splits side by side below data/: taking all would mix them.
    raise DataError(
        f"data: path = {str(root)!r}: no {_known()} file directly in this directory; "
        f"to read below it, give a pattern such as {root / '**' / 'train*.parquet'}"
    )


def _label(paths: list[Path]) -> LocalFiles:
    """Names files by what tells them apart: their path below the deepest common directory."""
    parents = [path.parent for path in paths]
    common = min(parents, key=lambda p: len(p.parts))
    while not all(path.is_relative_to(common) for path in paths):
        common = common.parent
    return LocalFiles(tuple(paths), tuple(_name(path.relative_to(common)) for path in paths))


def _name(path: Path) -> str:
    """As text that can be written: a file's name need not be UTF-8."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode("utf-8")


def _missing(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"no such file, and no directory {parent} (looked from {Path.cwd()})"
    here = [p.name for p in parent.iterdir() if data_suffix(p)]
    hint = f"; in {parent}: {suggest(path.name, here)}" if here else ""
    return f"no such file (looked from {Path.cwd()}){hint}"


def _known() -> str:
    return ", ".join(READERS) + " (all but .parquet also with .gz)"


def _open_hub(section: SourceSection) -> HubRows:
    """Raises: DataError for an unknown data set, configuration or split, or no way to reach the hub."""
    import datasets

    label = f"data: path = {section.path!r}"
    try:
        loaded = datasets.load_dataset(
            section.path, section.subset, split=section.split, revision=section.revision
        )
    # FileNotFoundError covers an unknown data set, ValueError an unknown configuration or split
    except (OSError, ValueError) as error:
        raise DataError(
            f"{label} (subset {section.subset}, split {section.split}): the hub data set cannot be loaded: "
            f"{error}. For a local file give a path that exists (looked from {Path.cwd()})"
        ) from error
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            raise DataError(
                f"{label}: has several splits; set split to one of {', '.join(map(str, loaded))}"
            )
        loaded = next(iter(loaded.values()))
    return HubRows(section.path, loaded)
