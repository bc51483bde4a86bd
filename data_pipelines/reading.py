"""Rows of the user's files, as the first stage of a pipeline meets them: numbered, with the columns to keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipelines.rows import OWN_COLUMNS, Row
from prefopt.data.formats import Reading, canonical, prompt_reading, prompt_row, resolve
from prefopt.data.readers import RawRow
from prefopt.data.rows import Refused, column, column_paths, has_column, row_id
from prefopt.data.rows import Row as Canonical
from prefopt.data.sources import first_rows, open_source
from prefopt.errors import DataError
from prefopt.recipe.schema import SourceSection
from prefopt.recipe.yaml_file import Document, KeyPath
from prefopt.storage.json_text import not_json


@dataclass(frozen=True)
class SourceRow:
    """One row of a source: where it stands, and what the reader makes of it."""

    id: str
    raw: RawRow
    found: Canonical | Refused
    source: str | None = None
    """The name that its source has in the settings."""
    absent: frozenset[str] = frozenset()
    """Columns of the other sources that this one does not have."""

    def kept(self, keep: Sequence[str]) -> Row:
        """The columns to keep, under the names they were asked for by (``metadata.answer``), and its source.

        One that only other sources have is null: tasks side by side have columns of their own.
        Raises: DataError naming file and line for one that the row lacks, or that no shard can hold.
        """
        here = [name for name in keep if has_column(self.raw.data, name) or name not in self.absent]
        found = dict.fromkeys(keep) | kept_columns(self.raw, here)
        return found if self.source is None else {**found, "source": self.source}


def source_rows(sources: Sequence[SourceSection], *, pairs: bool) -> Iterator[SourceRow]:
    """Every row of every source, in order, one in memory at a time.

    A row's id is its id column, else ``<file>:<row>``, after the number of its source where there are several.

    Args:
        sources: files or hub data sets.
        pairs: read chosen and rejected besides the prompt.

    Raises: DataError naming file and line; ConfigError for settings that contradict each other.
    """
    absent = _absent(sources)
    for number, section in enumerate(sources):
        prefix = f"{number}/" if len(sources) > 1 else ""
        source = open_source(section)
        reading: Reading | None = None
        for raw in first_rows(source, section.max_rows):
            if reading is None:
                reading = (
                    resolve(section, raw, pairs=True) if pairs else prompt_reading(section, raw)
                )
            found = canonical(raw, reading) if pairs else prompt_row(raw, reading)
            id_ = f"{prefix}{row_id(raw, reading.columns.id)}"
            yield SourceRow(id_, raw, found, section.name, absent[number])
        if reading is None:
            raise DataError(f"{section.path}: holds no rows")


def _absent(sources: Sequence[SourceSection]) -> list[frozenset[str]]:
    """For each source, what the first rows of the others have and its own has not; a dot descends."""
    if len(sources) == 1:
        return [frozenset()]
    firsts = [next(first_rows(open_source(each), 1), None) for each in sources]
    paths = [frozenset(() if row is None else column_paths(row.data)) for row in firsts]
    return [frozenset().union(*paths) - own for own in paths]


def count_source_rows(sources: Sequence[SourceSection]) -> int | None:
    """About how many rows the sources have; None where one cannot say without being read."""
    total = 0
    for section in sources:
        count = open_source(section).num_rows()
        if count is None:
            return None
        total += count if section.max_rows is None else min(count, section.max_rows)
    return total


def kept_columns(raw: RawRow, keep: Sequence[str]) -> Row:
    """The columns of a row by name. Raises: as `SourceRow.kept`."""
    kept = {name: column(raw, name) for name in keep}
    for name, value in kept.items():
        problem = not_json(value, (name,))
        if problem is not None:
            raise DataError(
                f"{raw.where}: column {problem}, and a pipeline's rows are JSON. Write text, a finite "
                "number or null there, or leave the column out of keep"
            )
    return kept


def keep_problems(keep: Sequence[str], document: Document, path: KeyPath) -> list[str]:
    """Columns to keep that would stand where a stage writes its own."""
    at = (*path, "keep")
    return [
        f"{document.origin(at)}keep: {name!r} is a column that stages write themselves; rename yours in the file"
        for name in keep
        if name in OWN_COLUMNS
    ]


def source_identity(sources: Sequence[SourceSection]) -> dict[str, Any]:
    """What changes whenever a row of a source would: hashes of files, fingerprints of hub data sets."""
    return {
        f"sources.{number}": open_source(each).identity() for number, each in enumerate(sources)
    }
