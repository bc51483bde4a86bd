"""One shard of a `map` stage, made by whoever: this process, another one, or another machine.

A worker writes a shard beside the others under a name of its own, and says what it wrote. Only the driver
renames it into place and records it (`data_pipelines.stage_runs`): what a worker that was given up for dead
writes later is nobody's.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.base import Dropped, MapWorker, Needs, Place, StageSettings, Tally
from data_pipelines.folder import dropped_line
from data_pipelines.manifest import code_hash
from data_pipelines.registry import get_stage
from data_pipelines.rows import Row, RowKind, require_columns
from data_pipelines.shards import ShardFile, read_shard, shard_name, write_shard
from prefopt.errors import DataError
from prefopt.recipe.load import import_plugin


@dataclass(frozen=True)
class Order:
    """A `map` stage as plain data, from which any process makes the same stage again."""

    stage: str
    """Its name in the registry."""
    keys: Mapping[str, Any]
    """Its settings, as written."""
    plugins: tuple[Path, ...]
    code: Mapping[str, str]
    """What the driver's code of the stage is; see `stage_code`."""
    gives: RowKind
    place: Place
    needs: Needs


@dataclass(frozen=True)
class Job:
    """A shard that is to be made."""

    number: int
    source: ShardFile


@dataclass(frozen=True)
class Made:
    """A shard that lies where its worker wrote it."""

    job: Job
    path: Path
    sha256: str
    tally: Tally
    dropped: tuple[str, ...]
    """Lines of the list of dropped rows."""


def stage_code(settings: StageSettings) -> dict[str, str]:
    """Hashes of the code that decides a stage's output, by module."""
    things = (type(settings), *settings.code())
    return {f"{thing.__module__}": code_hash(thing) for thing in things}


def ordered_settings(order: Order) -> StageSettings:
    """The settings of an ordered stage, in another process than the driver's.

    Raises: DataError if the code here is not the driver's.
    """
    for plugin in order.plugins:
        if not plugin.is_file():
            raise DataError(
                f"stage {order.place.id!r}: a worker does not find the plugin {plugin}. Put it, and what else the "
                "pipeline names, where every machine sees it under one path"
            )
        import_plugin(plugin)
    settings = get_stage(order.stage).settings.model_validate(dict(order.keys))
    code = stage_code(settings)
    if code != order.code:
        differs = sorted(
            k for k in code.keys() | order.code.keys() if code.get(k) != order.code.get(k)
        )
        raise DataError(
            f"stage {order.place.id!r}: a worker has other code than the command that was started: "
            f"{', '.join(differs)}. Install the same version on every machine, and run the same command again"
        )
    return settings


class ShardWorker:
    """Makes shard after shard of one stage.

    Args:
        order: the stage.
        settings: of the stage; models load with the first shard, not where there is none to make.
    """

    def __init__(self, order: Order, settings: StageSettings) -> None:
        self.order = order
        self.settings: Any = settings
        self._worker: MapWorker | None = None

    def make(self, job: Job) -> Made:
        """Raises: DataError; whatever the stage raises."""
        rows = read_shard(job.source)
        if self._worker is None:
            self._worker = self.settings.open(self.order.place)
        assert self._worker is not None
        results = self._worker.process(rows)
        id_ = self.order.place.id
        if len(results) != len(rows):
            raise DataError(
                f"stage {id_!r} answered {len(results)} times for {len(rows)} rows: a stage gives a "
                "row, a list of rows or Dropped for each of its rows"
            )
        kept, dropped = self._sort(rows, results)
        name = f"{uuid.uuid4().hex}-{shard_name(job.number)}"
        shard = write_shard(self.order.place.scratch / name, kept)
        tally = Tally(len(rows), len(kept))
        for each, _ in dropped:
            tally.drop(each.reason)
        lines = tuple(dropped_line(each, each.id or row["id"]) for each, row in dropped)
        return Made(job, shard.path, shard.sha256, tally, lines)

    def close(self) -> None:
        """Frees what the stage's worker holds. May be called twice."""
        if self._worker is not None:
            self._worker.close()

    def _sort(
        self, rows: Sequence[Row], results: Sequence[Any]
    ) -> tuple[list[Row], list[tuple[Dropped, Row]]]:
        id_ = self.order.place.id
        kept: list[Row] = []
        dropped: list[tuple[Dropped, Row]] = []
        for row, result in zip(rows, results, strict=True):
            found = [result] if isinstance(result, (dict, Dropped)) else list(result)
            if not found:
                raise DataError(
                    f"stage {id_!r}: row {row['id']} came to nothing without a reason: give Dropped(reason)"
                )
            for each in found:
                if isinstance(each, Dropped):
                    dropped.append((each, row))
                    continue
                require_columns(each, self.order.gives, f"stage {id_!r}, row {row['id']}")
                kept.append(each)
        return kept, dropped
