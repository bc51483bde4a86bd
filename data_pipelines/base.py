"""What a stage is: settings, what it reads and gives, and one function over rows.

A stage never counts, never opens a shard and never decides where it resumes: the runner does, so that no
stage can lose a row. It answers for every row it is given, with rows or with the reason there are none.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from data_pipelines.rows import Row, RowKind
from prefopt.recipe.schema import Section
from prefopt.recipe.walk import recorded
from prefopt.recipe.yaml_file import Document, KeyPath
from prefopt.shown import without_credentials


@dataclass(frozen=True)
class Dropped:
    """A row that ends here, and why; counted under ``reason`` and listed in the stage's dropped rows."""

    reason: str
    """A short name: counts are by it."""
    detail: str | None = None
    """What is not obvious from the reason, for people."""
    id: str | None = None
    """Of the row; the runner knows it where a stage works row by row."""


Result: TypeAlias = Row | Dropped | Sequence[Row | Dropped]
"""What became of one row: a row, the reason there is none, or several of these (at least one)."""


@dataclass(frozen=True)
class Needs:
    """What a worker of a `map` stage takes up."""

    stays: bool = False
    """It holds a model or a server, and so is made once for many shards; on Ray it is an actor."""
    num_gpus: float = 0


class StageSettings(Section):
    """Base of every stage's keys. The keys of a stage are the fields of its class."""

    def recorded(self) -> dict[str, Any]:
        """The settings that decide the output: a stage is not resumed under others. Time limits, say, are marked
        to have no effect (`prefopt.recipe.section.NoEffect`)."""
        return recorded(type(self), without_credentials(self.model_dump(mode="json")), "rows")

    def basis(self) -> Mapping[str, Any]:
        """What the output depends on beside settings, input and code: hashes of files and weights.

        Called before anything loads. Raises: DataError, ModelError for what is not there.
        """
        return {}

    def code(self) -> tuple[Any, ...]:
        """Further functions or classes whose modules decide the output: signals, credit rules."""
        return ()

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        """What is wrong with the settings beyond their types, a sentence each, with its line."""
        del reads, document, path
        return []

    def num_rows_in(self, place: Place) -> int | None:
        """About how many rows there are to go through, for a progress bar."""
        return place.input.num_rows if place.input is not None else None

    def needs(self) -> Needs:
        """What each of a `map` stage's workers takes up, where more machines than one share its shards."""
        return Needs()

    def report(self, rows: Iterator[Row], tally: Tally) -> dict[str, Any]:
        """What a `map` stage found out about all rows; goes into its sealed record, and so into the manifest.

        Args:
            rows: the output of all its shards, in order, one shard in memory at a time; read if it is asked for.
            tally: rows in and out, and dropped by reason.
        """
        del rows, tally
        return {}

    def needs_fields(self) -> tuple[str, ...]:
        """Columns of the user's that this stage reads: the first stage must keep them."""
        return ()

    def gives_fields(self) -> tuple[str, ...]:
        """Columns this stage adds for later ones to read, which the first stage then need not keep."""
        return ()


@dataclass(frozen=True)
class Place:
    """Where and as what a stage runs."""

    id: str
    """Of the stage; unique in its pipeline, and the name of its folder."""
    seed: int
    """Of the pipeline."""
    reads: RowKind | None
    """What its input rows are; None for a stage that reads files."""
    log_dir: Path
    scratch: Path
    """A folder for temporary files, of this stage alone. A `whole` stage empties it after use; in that of a `map`
    stage its workers leave their shards, for the driver to put in place."""
    input: Input | None = None
    """All rows that come in, for stages that need to see them twice; None before the runner is there."""
    report: dict[str, Any] = field(default_factory=dict)
    """What a `whole` stage found out about all rows; goes into its sealed record, and so into the manifest."""
    folder: Path | None = None
    """The stage's own, where its shards come; it may leave a directory of its own there, which readers of the
    shards pass over, written whole or not at all: a killed stage starts over. None before the runner is there."""

    def rng(self, key: str) -> random.Random:
        """A generator for one row, the same in whatever shard, process or order the row comes."""
        return random.Random(f"{self.seed}\0{self.id}\0{key}")


class Input(Protocol):
    """The output of the stage before, which is complete."""

    @property
    def num_rows(self) -> int: ...

    def rows(self) -> Iterator[Row]:
        """All rows in order, one shard in memory at a time."""
        ...


class MapWorker(Protocol):
    """Works shard by shard; what a `map` stage's `open` gives. Models load when it is made."""

    def process(self, rows: Sequence[Row]) -> Sequence[Result]:
        """One result a row, in order. Equal rows give equal results whatever the shard they are in, as far as
        an engine's arithmetic does."""
        ...

    def close(self) -> None:
        """Frees what it holds. May be called twice."""
        ...


class MapStage(Protocol):
    """A stage whose shard k depends on shard k of its input only: several workers share its shards."""

    def open(self, place: Place) -> MapWorker: ...


class WholeStage(Protocol):
    """A stage that must see every row: one worker runs it, in constant memory."""

    def run(self, place: Place) -> Iterator[Row | Dropped]:
        """Every output row in order, and a `Dropped` with its id for every row that ends here."""
        ...


@dataclass(frozen=True)
class RowByRow:
    """A worker from a function of one row."""

    fn: Any

    def process(self, rows: Sequence[Row]) -> Sequence[Result]:
        return [self.fn(row) for row in rows]

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class Tally:
    """Rows in and out of one shard or stage, by reason."""

    rows_in: int = 0
    rows_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def add(self, others: Iterable[Tally]) -> Tally:
        """This tally with others added."""
        for other in others:
            self.rows_in += other.rows_in
            self.rows_out += other.rows_out
            for reason, count in other.dropped.items():
                self.dropped[reason] = self.dropped.get(reason, 0) + count
        return self

    def record(self) -> dict[str, Any]:
        return {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "dropped": dict(sorted(self.dropped.items())),
        }
