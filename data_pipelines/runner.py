"""Runs a pipeline, or goes on with it, stage by stage. Of a folder's records this process is the only writer."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from data_pipelines.base import Place
from data_pipelines.executors import Executor, open_executor
from data_pipelines.folder import StageFolder, write_manifest
from data_pipelines.manifest import Change, changes, read_record, write_record
from data_pipelines.pipeline import BoundStage, Pipeline
from data_pipelines.shard_work import Order, stage_code
from data_pipelines.shards import Shards
from data_pipelines.stage_runs import run_map, run_whole
from prefopt.errors import ConfigError, DataError
from prefopt.report.bars import Bar
from prefopt.storage.holder import held
from prefopt.storage.reading import digest

logger = logging.getLogger("prefopt.data")


def build(pipeline: Pipeline, *, start: str | None = None) -> dict[str, Any]:
    """Runs what is not done yet; returns the last stage's record. After a kill it goes on at the last whole shard.

    Args:
        pipeline: what to run, and who makes its shards.
        start: move this stage and those after it to ``replaced/`` first, and make them again.

    Raises: ConfigError if a stage was made of something else, or for a stage there is none of; DataError for
        files that are broken, changed or in use, or a shard that its workers die on; whatever a stage raises.
    """
    with (
        contextlib.closing(open_executor(pipeline.settings.executor)) as executor,
        held(pipeline.directory, work="build", advice="Another output_dir is free"),
    ):
        if start is not None:
            _set_aside(pipeline, start)
        return _build(pipeline, executor)


def _build(pipeline: Pipeline, executor: Executor) -> dict[str, Any]:
    depends = [_depends(pipeline, stage) for stage in pipeline.stages]
    _check_unchanged(pipeline, depends)
    done: list[tuple[str, dict[str, Any]]] = []
    shards: Shards | None = None
    for stage, basis in zip(pipeline.stages, depends, strict=True):
        folder = StageFolder(pipeline.directory, stage.id)
        record = folder.done()
        if record is None:
            basis = {**basis, "input": digest(done[-1][1]) if done else None}
            write_record(folder.stage_record, basis)
            record = _run(pipeline, stage, folder, basis, shards, executor)
        shutil.rmtree(
            folder.parts, ignore_errors=True
        )  # also those of a run that was cut short here
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
    return json.loads(
        json.dumps(
            {
                "stage": stage.spec.name,
                "settings": stage.settings.recorded(),
                "code": stage_code(stage.settings),
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
        record = read_record(folder.stage_record, {"input": (str, NoneType)})
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


def _run(
    pipeline: Pipeline,
    stage: BoundStage,
    folder: StageFolder,
    basis: dict[str, Any],
    shards: Shards | None,
    executor: Executor,
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
    with Bar(desc=stage.id, unit="row", total=stage.settings.num_rows_in(place)) as bar:
        if stage.spec.works == "map":
            order = _order(pipeline, stage, place, basis["code"])
            record = run_map(
                stage.settings, order, folder, executor, bar, form=pipeline.settings.format
            )
        else:
            record = run_whole(stage, place, folder, pipeline.settings, bar)
    record = {"gives": str(stage.gives), "basis": digest(basis), **record}
    write_record(folder.done_record, record)
    logger.info("%s", _summary(stage.id, record, time.perf_counter() - started))
    return record


def _order(pipeline: Pipeline, stage: BoundStage, place: Place, code: dict[str, str]) -> Order:
    keys = pipeline.settings.stages[pipeline.index(stage.id)]
    return Order(
        stage=stage.spec.name,
        keys={key: value for key, value in keys.items() if key not in ("stage", "id")},
        plugins=pipeline.plugins,
        code=code,
        gives=stage.gives,
        place=place,
        needs=stage.settings.needs(),
    )


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


def _set_aside(pipeline: Pipeline, start: str) -> None:
    """Moves ``start`` and what follows to ``replaced/``. Raises: ConfigError for a stage there is none of."""
    for stage in reversed(pipeline.stages[pipeline.index(start) :]):
        # cut short, what is left is a pipeline that ends earlier
        moved = StageFolder(pipeline.directory, stage.id).set_aside()
        if moved:
            logger.info("%s: what there was is in %s", stage.id, moved[0].parent)
