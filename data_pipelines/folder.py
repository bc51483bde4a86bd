"""The folder of a pipeline: where shards, records and dropped rows of each stage lie."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.base import Dropped
from data_pipelines.manifest import REPAIR, read_record, write_record
from data_pipelines.shards import ShardFile, Shards
from prefopt.errors import DataError
from prefopt.storage.cache import AGAIN, write_whole
from prefopt.storage.reading import as_object, reading

MANIFEST = "manifest.json"
_RECORDS = "manifest"
_ASIDE = "replaced"
_COUNTS = {"counts": dict, "counts.rows_in": int, "counts.rows_out": int, "counts.dropped": dict}
_DONE = {"shards": list, **_COUNTS}
_SHARD = {"file": str, "rows_out": int, "sha256": str}


@dataclass(frozen=True)
class StageFolder:
    """One stage's files. Shards alone lie in ``<output_dir>/<id>``, so that a recipe can name that folder."""

    root: Path
    id: str

    @property
    def shards(self) -> Path:
        return self.root / self.id

    @property
    def parts(self) -> Path:
        """Where the shards of a stage that is to give Parquet lie until all are made."""
        return self.root / ".parts" / self.id

    @property
    def records(self) -> Path:
        return self.root / _RECORDS / self.id

    @property
    def stage_record(self) -> Path:
        return self.records / "stage.json"

    @property
    def done_record(self) -> Path:
        return self.records / "done.json"

    def shard_record(self, number: int) -> Path:
        return self.records / f"{number:05d}.json"

    def dropped(self, number: int | None = None) -> Path:
        """Where the rows that ended in this stage are listed, those of one shard or of a whole stage."""
        return self.records / ("dropped.jsonl" if number is None else f"{number:05d}.dropped.jsonl")

    def write_dropped(self, number: int, lines: Sequence[str]) -> None:
        """Lists the rows that ended in one shard; no file where none did. Raises: DataError for a full disk."""
        path = self.dropped(number)
        if not lines:
            path.unlink(missing_ok=True)  # of an earlier attempt
            return
        write_whole(path, "".join(lines), AGAIN)

    def made(self, number: int) -> dict[str, Any] | None:
        """The record of one shard, None where it is to be made. Raises: DataError as `read_record`."""
        return read_record(self.shard_record(number), {**_SHARD, "rows_in": int, "dropped": dict})

    def num_recorded(self) -> int:
        """Shards of a `map` stage that are made."""
        return sum(path.stem.isdigit() for path in self.records.glob("*.json"))

    def done(self) -> dict[str, Any] | None:
        """The record of the finished stage. Raises: DataError as `read_record`."""
        record = read_record(self.done_record, _DONE)
        for shard in record["shards"] if record is not None else ():
            with reading(self.done_record, "the record of a stage", REPAIR):
                as_object(shard, _SHARD)
        return record

    def output(self, done: Mapping[str, Any]) -> Shards:
        """The shards that a finished stage's record names."""
        return Shards(
            [
                ShardFile(self.shards / shard["file"], shard["rows_out"], shard["sha256"])
                for shard in done["shards"]
            ]
        )

    def exists(self) -> bool:
        return self.records.exists() or self.shards.exists()

    def set_aside(self) -> list[Path]:
        """Moves all that was made under ``replaced/``: nothing is lost. Returns where it went."""
        moved = []
        shutil.rmtree(self.parts, ignore_errors=True)
        for path in (self.records, self.shards):  # without a record, shards are nobody's
            if path.exists():
                moved.append(_aside(self.root, path))
        return moved


def _aside(root: Path, path: Path) -> Path:
    kind = "records" if path.parent.name == _RECORDS else "shards"
    for number in range(1, 100_000):
        target = root / _ASIDE / f"{path.name}-{number}" / kind
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(path, target)
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be moved to {target}: {error.strerror or error}"
                ) from error
            return target
    raise DataError(f"{root / _ASIDE}: is full of replaced stages; delete it")


def dropped_line(dropped: Dropped, id_: str | None) -> str:
    """A dropped row as its line in the list says it."""
    line = {"id": id_, "reason": dropped.reason}
    line |= {"detail": dropped.detail} if dropped.detail is not None else {}
    text = json.dumps(line, ensure_ascii=False) + "\n"
    # half of a surrogate pair, escaped as JSON has it: a reason must not stop the list of reasons
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_manifest(root: Path, name: str, stages: Sequence[tuple[str, Mapping[str, Any]]]) -> Path:
    """Writes the manifest of a finished pipeline: every stage's record, in order, sealed as one."""
    path = root / MANIFEST
    write_record(path, {"pipeline": name, "stages": [{"id": id_, **done} for id_, done in stages]})
    return path
