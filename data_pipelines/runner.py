"""Runs a pipeline, or goes on with it: stage by stage, shard by shard, alone or beside other workers."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipelines.base import Place
from data_pipelines.folder import StageFolder, write_manifest
from data_pipelines.leases import Leases
from data_pipelines.manifest import Change, changes, code_hash, digest, read_record, write_record
from data_pipelines.map_stage import run_map
from data_pipelines.pipeline import BoundStage, Pipeline
from data_pipelines.shards import Shards
from data_pipelines.whole_stage import run_whole
from prefopt.errors import ConfigError, DataError

logger = logging.getLogger("prefopt.data")


def build(pipeline: Pipeline) -> dict[str, Any]:
    """Runs what is not done yet; returns the last stage's record.

    The same command on several machines shares the work; after a kill it goes on at the last whole shard.
    Raises: ConfigError if a stage was made of something else; DataError for files that are broken, changed
        or in use; whatever a stage raises.
    """
    leases = _leases(pipeline)
    depends = [_depends(pipeline, stage) for stage in pipeline.stages]
    _check_unchanged(pipeline, depends)
    done: list[tuple[str, dict[str, Any]]] = []
    shards: Shards | None = None
    for stage, basis in zip(pipeline.stages, depends, strict=True):
        folder = StageFolder(pipeline.directory, stage.id)
        record = folder.done()
        if record is None:
            basis = {**basis, "input": digest(done[-1][1]) if done else None}
            _open_record(folder, basis)
            record = _run(pipeline, stage, folder, basis, shards, leases)
        done.append((stage.id, record))
        shards = folder.output(record)
        _require_rows(stage, record)
    write_manifest(pipeline.directory, Path(pipeline.source).stem, done)
    return done[-1][1]


def status(pipeline: Pipeline) -> list[tuple[str, dict[str, Any] | None]]:
    """Each stage's record, None for one that is not finished. Raises: DataError for a broken record."""
    return [
        (stage.id, StageFolder(pipeline.directory, stage.id).done()) for stage in pipeline.stages
    ]


def _depends(pipeline: Pipeline, stage: BoundStage) -> dict[str, Any]:
    """What a stage's output depends on beside its input."""
    things = (type(stage.settings), *stage.settings.code())
    return json.loads(
        json.dumps(
            {
                "stage": stage.spec.name,
                "settings": stage.settings.recorded(),
                "code": {f"{t.__module__}": code_hash(t) for t in things},
                "depends": dict(stage.settings.basis()),
                "seed": pipeline.settings.seed,
                "shard_rows": pipeline.settings.shard_rows,
                "format": pipeline.settings.format,
            }
        )
    )


def _check_unchanged(pipeline: Pipeline, depends: Sequence[dict[str, Any]]) -> None:
    """Raises ConfigError naming every difference, of the first stage that differs; nothing has run yet."""
    before: dict[str, Any] | None = None
    unfinished: str | None = None
    for number, (stage, basis) in enumerate(zip(pipeline.stages, depends, strict=True)):
        folder = StageFolder(pipeline.directory, stage.id)
        record = read_record(folder.stage_record)
        if record is None and folder.exists() and folder.done_record.exists():
            raise DataError(
                f"{folder.stage_record}: is missing, and the stage is recorded as done. Restore it, or make the "
                f"stage again with --from {stage.id}"
            )
        if record is not None:
            expected = {**basis, "input": record["input"]}
            found = changes(record, expected)
            if number and unfinished is not None:
                found.append(
                    Change("input", "complete", f"not: stage {unfinished!r} is to be made first")
                )
            elif before is not None and record["input"] != digest(before):
                found.append(
                    Change(
                        "input",
                        record["input"][:12],
                        f"{digest(before)[:12]} ({pipeline.stages[number - 1].id})",
                    )
                )
            _refuse(stage, found)
        before = folder.done()
        if before is None and unfinished is None:
            unfinished = stage.id


def _refuse(stage: BoundStage, found: Sequence[Change]) -> None:
    if found:
        raise ConfigError(
            [
                f"stage {stage.id!r} was made differently: {change}. Put it back, take another output_dir, or "
                f"make this stage and those after it again: --from {stage.id}"
                for change in found
            ]
        )


def _open_record(folder: StageFolder, basis: dict[str, Any]) -> None:
    """Writes down what a stage is about to be made of, unless another worker has."""
    if not write_record(folder.stage_record, basis, exclusive=True):
        found = changes(read_record(folder.stage_record), basis)
        if found:
            raise ConfigError(
                f"stage {folder.id!r}: another worker makes it differently: {found[0]}. Run the same pipeline "
                "file with the same code everywhere"
            )


def _run(
    pipeline: Pipeline,
    stage: BoundStage,
    folder: StageFolder,
    basis: dict[str, Any],
    shards: Shards | None,
    leases: Leases,
) -> dict[str, Any]:
    place = Place(
        id=stage.id,
        seed=pipeline.settings.seed,
        reads=stage.reads,
        log_dir=pipeline.directory / "logs",
        scratch=pipeline.directory / ".scratch" / stage.id,
        input=shards,
        folder=folder.shards,
    )
    started = time.perf_counter()
    run = run_map if stage.spec.works == "map" else run_whole
    with tqdm(desc=stage.id, unit="row", total=stage.settings.num_rows_in(place)) as bar:
        record = run(stage, place, folder, leases, pipeline.settings, bar)
    record = {"gives": str(stage.gives), "basis": digest(basis), **record}
    write_record(folder.done_record, record, exclusive=True)
    logger.info("%s", _summary(stage.id, record, time.perf_counter() - started))
    found = folder.done()
    assert found is not None  # just written, by this worker or by another
    return found


def _summary(id_: str, record: dict[str, Any], seconds: float) -> str:
    counts = record["counts"]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts["dropped"].items())
    tail = f" (dropped: {reasons})" if reasons else ""
    return f"{id_}: {counts['rows_in']:,} in, {counts['rows_out']:,} {record['gives']} out{tail}, {seconds:.1f} s"


def _require_rows(stage: BoundStage, record: dict[str, Any]) -> None:
    counts = record["counts"]
    if counts["rows_out"] == 0:
        reasons = (
            ", ".join(f"{n:,} {reason}" for reason, n in counts["dropped"].items())
            or "none came in"
        )
        raise DataError(
            f"stage {stage.id!r}: not one row is left of {counts['rows_in']:,} ({reasons}). Change its settings "
            f"and make it again: --from {stage.id}"
        )


def _leases(pipeline: Pipeline) -> Leases:
    return Leases(pipeline.directory / "leases", pipeline.settings.lease_s)


def redo(pipeline: Pipeline, start: str) -> None:
    """Moves ``start`` and what comes after it to ``replaced/``, for `build` to make again.

    Raises: ConfigError for a stage there is none of; DataError while others work on them.
    """
    leases = _leases(pipeline)
    stages = pipeline.stages[pipeline.index(start) :]
    ids = {stage.id for stage in stages}
    busy = [each for each in leases.holders() if each.split("/")[0] in ids]
    if busy:
        raise DataError(
            f"--from {start}: others are at work on it: {', '.join(busy)}. Stop them first"
        )
    for stage in reversed(stages):  # cut short, what is left is a pipeline that ends earlier
        moved = StageFolder(pipeline.directory, stage.id).set_aside()
        if moved:
            logger.info("%s: what there was is in %s", stage.id, moved[0].parent)
