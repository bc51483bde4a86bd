"""Runs a `whole` stage: one pass, shards as the rows come; cut short, it starts over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from data_pipelines.base import Dropped, Place, Tally
from data_pipelines.folder import StageFolder, dropped_line
from data_pipelines.pipeline import BoundStage, PipelineSettings
from data_pipelines.rows import Row, require_columns
from data_pipelines.shards import in_shards, shard_name, write_shard
from prefopt.storage.cache import atomic_write


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
