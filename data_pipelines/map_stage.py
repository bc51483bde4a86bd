"""Runs a `map` stage: workers make its shards, and this process alone puts them in place and records them."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any

from data_pipelines.base import StageSettings, Tally
from data_pipelines.executors import Executor
from data_pipelines.folder import StageFolder
from data_pipelines.manifest import read_record, write_record
from data_pipelines.shard_work import Job, Made, Order
from data_pipelines.shards import Shards, shard_name
from prefopt.errors import DataError


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
    records = {job.number: read_record(folder.shard_record(job.number)) for job in jobs}
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
