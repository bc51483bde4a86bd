"""Runs a stage: a `map` one, whose shards workers make and this process records, or a `whole` one at once."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data_pipelines.base import Dropped, Place, StageSettings, Tally
from data_pipelines.executors import Executor
from data_pipelines.folder import StageFolder, dropped_line
from data_pipelines.manifest import write_record
from data_pipelines.pipeline import BoundStage, PipelineSettings
from data_pipelines.rows import Row, require_columns
from data_pipelines.shard_work import Job, Made, Order
from data_pipelines.shards import (
    ShardFile,
    Shards,
    in_shards,
    shard_name,
    write_parquet,
    write_shard,
)
from prefopt.errors import DataError
from prefopt.storage.cache import atomic_write


def run_map(
    settings: StageSettings,
    order: Order,
    folder: StageFolder,
    executor: Executor,
    bar: Any,
    *,
    form: str,
) -> dict[str, Any]:
    """Makes every shard that has no record yet.

    Returns: ``shards``, ``counts`` and, where the stage gives one, its ``report``.
    Raises: DataError; whatever the stage raises.
    """
    shards = order.place.input
    assert isinstance(shards, Shards)
    jobs = [Job(number, source) for number, source in enumerate(shards.files)]
    made_in = folder.parts if form == "parquet" else folder.shards
    records = {job.number: _part_record(folder, job.number) for job in jobs}
    bar.update(sum(record["rows_in"] for record in records.values() if record))
    shutil.rmtree(order.place.scratch, ignore_errors=True)  # of an attempt that was cut short
    todo = [job for job in jobs if records[job.number] is None]
    with contextlib.closing(executor.make(order, settings, todo)) as found:
        for made in found:
            records[made.job.number] = _put_in_place(made, folder, made_in)
            bar.update(made.tally.rows_in)
    shutil.rmtree(order.place.scratch, ignore_errors=True)
    shards_made = _final(folder, made_in, [record for record in records.values() if record])
    tallies = [Tally(r["rows_in"], r["rows_out"], dict(r["dropped"])) for r in shards_made]
    result = {"shards": shards_made, "counts": Tally().add(tallies).record()}
    report = settings.report(folder.output(result).rows(), Tally().add(tallies))
    return result | ({"report": report} if report else {})


def _part_record(folder: StageFolder, number: int) -> dict[str, Any] | None:
    record = folder.made(number)
    return record if record is not None and record["file"] == shard_name(number) else None


def _final(
    folder: StageFolder, made_in: Path, records: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The records of the shards as the next stage and other tools read them."""
    if made_in == folder.shards:
        return records
    parts = [ShardFile(made_in / r["file"], r["rows_out"], r["sha256"]) for r in records]
    found = write_parquet(parts, folder.shards)
    return [
        {**record, "file": shard.path.name, "sha256": shard.sha256}
        for record, shard in zip(records, found, strict=True)
    ]


def _put_in_place(made: Made, folder: StageFolder, made_in: Path) -> dict[str, Any]:
    """The record of a shard, written once the shard lies where it belongs. Raises: DataError."""
    number = made.job.number
    path = made_in / shard_name(number)
    folder.write_dropped(number, made.dropped)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(made.path, path)
    except FileNotFoundError as error:
        raise DataError(
            f"stage {folder.id!r}, shard {number}: a worker wrote {made.path}, and it is not here. "
            "output_dir must lie on storage that all machines see under one path"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    record = {
        "file": path.name,
        "input": made.job.source.sha256,
        "sha256": made.sha256,
        **made.tally.record(),
    }
    write_record(folder.shard_record(number), record)
    return record


def run_whole(
    stage: BoundStage, place: Place, folder: StageFolder, settings: PipelineSettings, bar: Any
) -> dict[str, Any]:
    """Makes all shards of the stage.

    Returns: ``shards``, ``counts`` and, where the stage gives one, its ``report``.
    Raises: DataError; whatever the stage raises.
    """
    tally = Tally()
    folder.records.mkdir(parents=True, exist_ok=True)
    made_in = folder.parts if settings.format == "parquet" else folder.shards
    shards: list[dict[str, Any]] = []
    with (
        atomic_write(folder.dropped()) as temporary,
        temporary.open("w", encoding="utf-8") as lines,
    ):
        rows = _kept(stage, place, tally, lines, bar)
        for number, batch in enumerate(in_shards(rows, settings.shard_rows)):
            shard = write_shard(made_in / shard_name(number), batch)
            tally.rows_out += len(batch)
            shards.append({"file": shard.path.name, "rows_out": len(batch), "sha256": shard.sha256})
    report = {"report": place.report} if place.report else {}
    shards = _final(folder, made_in, shards)
    return {"shards": shards, "counts": tally.record(), **report}


def _kept(stage: BoundStage, place: Place, tally: Tally, lines: IO[str], bar: Any) -> Iterator[Row]:
    """The rows the stage gives; those it drops are listed and counted."""
    for result in stage.settings.run(place):
        tally.rows_in += 1
        bar.update()
        if isinstance(result, Dropped):
            tally.drop(result.reason)
            lines.write(dropped_line(result, result.id))
        else:
            require_columns(result, stage.gives, f"stage {place.id!r}, row {result.get('id')}")
            yield result
