"""Runs a `map` stage: each shard is leased, made, written and recorded, and never half of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from data_pipelines.base import Dropped, MapWorker, Place, Tally
from data_pipelines.folder import StageFolder, dropped_line
from data_pipelines.leases import Leases
from data_pipelines.manifest import read_record, write_record
from data_pipelines.pipeline import BoundStage, PipelineSettings
from data_pipelines.rows import Row, require_columns
from data_pipelines.shards import ShardFile, Shards, read_shard, shard_name, write_shard
from prefopt.errors import DataError

logger = logging.getLogger("prefopt.data")
_POLL_S = 0.5


def run_map(
    stage: BoundStage,
    place: Place,
    folder: StageFolder,
    leases: Leases,
    settings: PipelineSettings,
    bar: Any,
) -> dict[str, Any]:
    """Makes every shard that nobody has made; returns when all are there, whoever made them.

    Returns: ``shards``, ``counts`` and, where the stage gives one, its ``report``.
    Raises: DataError; whatever the stage raises.
    """
    shards = place.input
    assert isinstance(shards, Shards)
    job = _Job(stage, place, folder, leases, settings, shards, bar)
    try:
        while job.pending():
            if not job.round():
                job.wait()
    finally:
        job.close()
    return job.record()


class _Job:
    def __init__(
        self,
        stage: BoundStage,
        place: Place,
        folder: StageFolder,
        leases: Leases,
        settings: PipelineSettings,
        shards: Shards,
        bar: Any,
    ) -> None:
        self.stage = stage
        self.place = place
        self.folder = folder
        self.leases = leases
        self.settings = settings
        self.shards = shards
        self.bar = bar
        self.records: dict[int, dict[str, Any]] = {}
        self._worker: MapWorker | None = None
        self._told = False

    def pending(self) -> list[int]:
        """Shards without a record, those of other workers looked up anew."""
        for number in range(len(self.shards.files)):
            if number not in self.records:
                self._look_up(number)
        return [n for n in range(len(self.shards.files)) if n not in self.records]

    def round(self) -> int:
        """Tries every pending shard once; returns how many this worker made."""
        made = 0
        for number in self.pending():
            with self.leases.hold(f"{self.place.id}/{number:05d}") as mine:
                if mine and self._look_up(number) is None:
                    self._make(number)
                    made += 1
        return made

    def wait(self) -> None:
        """Others have what is left: waits for them, or for a lease to run out."""
        if not self._told:
            self._told = True
            logger.info(
                "%s: waiting for %s", self.place.id, ", ".join(self.leases.holders()) or "others"
            )
        time.sleep(_POLL_S)

    def record(self) -> dict[str, Any]:
        records = [self.records[number] for number in sorted(self.records)]
        tallies = [Tally(r["rows_in"], r["rows_out"], dict(r["dropped"])) for r in records]
        result = {"shards": records, "counts": Tally().add(tallies).record()}
        rows = self.folder.output(result).rows()
        report = self.stage.settings.report(rows, Tally().add(tallies))
        return result | ({"report": report} if report else {})

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()

    def _look_up(self, number: int) -> dict[str, Any] | None:
        record = read_record(self.folder.shard_record(number))
        if record is not None and number not in self.records:
            self.records[number] = record
            self.bar.update(record["rows_in"])
        return record

    def _make(self, number: int) -> None:
        source = self.shards.files[number]
        rows = read_shard(source)
        results = self._open().process(rows)
        if len(results) != len(rows):
            raise DataError(
                f"stage {self.place.id!r} answered {len(results)} times for {len(rows)} rows: a stage gives a "
                "row, a list of rows or Dropped for each of its rows"
            )
        kept, dropped = self._sort(rows, results)
        self._hand_in(number, source, kept, dropped)

    def _open(self) -> MapWorker:
        if (
            self._worker is None
        ):  # models load with the first shard, not where there is none to make
            self._worker = self.stage.settings.open(self.place)
        assert self._worker is not None
        return self._worker

    def _sort(
        self, rows: Sequence[Row], results: Sequence[Any]
    ) -> tuple[list[Row], list[tuple[Dropped, Row]]]:
        kept: list[Row] = []
        dropped: list[tuple[Dropped, Row]] = []
        for row, result in zip(rows, results, strict=True):
            found = [result] if isinstance(result, (dict, Dropped)) else list(result)
            if not found:
                raise DataError(
                    f"stage {self.place.id!r}: row {row['id']} came to nothing without a reason: give "
                    "Dropped(reason)"
                )
            for each in found:
                if isinstance(each, Dropped):
                    dropped.append((each, row))
                    continue
                require_columns(each, self.stage.gives, f"stage {self.place.id!r}, row {row['id']}")
                kept.append(each)
        return kept, dropped

    def _hand_in(
        self, number: int, source: ShardFile, kept: list[Row], dropped: list[tuple[Dropped, Row]]
    ) -> None:
        """Writes shard and record. A worker that has lost its lease meanwhile throws its own away."""
        if not self.leases.holds(f"{self.place.id}/{number:05d}"):
            logger.warning(
                "%s: another worker has taken over shard %d, because this one gave no sign of life for lease_s = "
                "%g s; what was made here is thrown away", self.place.id, number, self.settings.lease_s,
            )  # fmt: skip
            return
        path = self.folder.shards / shard_name(number, self.settings.format)
        lines = [dropped_line(each, each.id or row["id"]) for each, row in dropped]
        self.folder.write_dropped(number, lines)
        shard = write_shard(path, kept)
        tally = Tally(source.rows, len(kept))
        for each, _ in dropped:
            tally.drop(each.reason)
        record = {
            "file": path.name,
            "input": source.sha256,
            "sha256": shard.sha256,
            **tally.record(),
        }
        if not write_record(self.folder.shard_record(number), record, exclusive=True):
            found = read_record(self.folder.shard_record(number))
            if found != record:
                raise DataError(
                    f"{path}: two workers made this shard at once, and differently. Delete it and its record "
                    f"{self.folder.shard_record(number)}, raise lease_s = {self.settings.lease_s:g}, and run "
                    "the same command again"
                )
        self._look_up(number)
