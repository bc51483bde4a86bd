"""Runs a stage: a `map` one, whose shards workers make and this process records, or a `whole` one at once."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import IO, Any

from data_pipelines.base import Dropped, Place, StageSettings, Tally
from data_pipelines.executors import Executor
from data_pipelines.folder import StageFolder, dropped_line
from data_pipelines.manifest import write_record
from data_pipelines.pipeline import BoundStage, PipelineSettings
from data_pipelines.rows import Row, require_columns
from data_pipelines.shard_work import Job, Made, Order
from data_pipelines.shards import Shards, in_shards, shard_name, write_shard
from prefopt.errors import DataError
from prefopt.storage.cache import atomic_write


def run_map(
    settings: StageSettings, order: Order, folder: StageFolder, executor: Executor, bar: Any
) -> dict[str, Any]:
    """Makes every shard that has no record yet.

    Returns: ``shards``, ``counts`` and, where the stage gives one, its ``report``.
    Raises: DataError; whatever the stage raises.
    """
    shards = order.place.input
    assert isinstance(shards, Shards)
    jobs = [Job(number, source) for number, source in enumerate(shards.files)]
    records = {job.number: folder.made(job.number) for job in jobs}
    bar.update(sum(record["rows_in"] for record in records.values() if record))
    shutil.rmtree(order.place.scratch, ignore_errors=True)  # of an attempt that was cut short
    todo = [job for job in jobs if records[job.number] is None]
    with contextlib.closing(executor.make(order, settings, todo)) as found:
        for made in found:
            records[made.job.number] = _put_in_place(made, order, folder)
            bar.update(made.tally.rows_in)
    shutil.rmtree(order.place.scratch, ignore_errors=True)
    return _record(settings, folder, [record for record in records.values() if record])


def _put_in_place(made: Made, order: Order, folder: StageFolder) -> dict[str, Any]:
    """The record of a shard, written once the shard lies where it belongs. Raises: DataError."""
    number = made.job.number
    path = folder.shards / shard_name(number, order.format)
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


def _record(
    settings: StageSettings, folder: StageFolder, records: list[dict[str, Any]]
) -> dict[str, Any]:
    tallies = [Tally(r["rows_in"], r["rows_out"], dict(r["dropped"])) for r in records]
    result = {"shards": records, "counts": Tally().add(tallies).record()}
    report = settings.report(folder.output(result).rows(), Tally().add(tallies))
    return result | ({"report": report} if report else {})


def run_whole(
    stage: BoundStage, place: Place, folder: StageFolder, settings: PipelineSettings, bar: Any
) -> dict[str, Any]:
    """Makes all shards of the stage.

    Returns: ``shards``, ``counts`` and, where the stage gives one, its ``report``.
    Raises: DataError; whatever the stage raises.
    """
    tally = Tally()
    folder.records.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    with (
        atomic_write(folder.dropped()) as temporary,
        temporary.open("w", encoding="utf-8") as lines,
    ):
        rows = _kept(stage, place, tally, lines, bar)
        for number, batch in enumerate(in_shards(rows, settings.shard_rows)):
            path = folder.shards / shard_name(number, settings.format)
            shard = write_shard(path, batch)
            tally.rows_out += len(batch)
            shards.append({"file": path.name, "rows_out": len(batch), "sha256": shard.sha256})
    report = {"report": place.report} if place.report else {}
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
