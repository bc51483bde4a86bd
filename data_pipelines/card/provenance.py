"""What a stage's folder was made of: its manifest, checked against the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipelines.card.findings import Check, Section, TableView
from data_pipelines.folder import StageFolder
from data_pipelines.manifest import read_record
from data_pipelines.shards import read_shard
from prefopt.errors import DataError

_MOST_CHARS = 160


def provenance_section(folder: Path) -> Section:
    """Counts of every stage that was recorded, settings of this one, and whether the shards are what it says."""
    root = folder.parent
    stage = StageFolder(root, folder.name)
    check = _check(stage)
    stages = [
        StageFolder(root, path.name) for path in (root / "manifest").iterdir() if path.is_dir()
    ]
    records = [(each.id, done) for each in stages if (done := _quietly(each)) is not None]
    records.sort(key=lambda item: -item[1]["counts"]["rows_in"])
    rows = tuple(
        (
            id_,
            f"{done['counts']['rows_in']:,}",
            f"{done['counts']['rows_out']:,}",
            ", ".join(f"{n:,} {reason}" for reason, n in done["counts"]["dropped"].items()),
        )
        for id_, done in records
    )
    tables = [
        TableView("Stages of this pipeline, by rows in", ("stage", "in", "out", "dropped"), rows)
    ]
    settings = read_record(stage.stage_record) or {}
    shown = tuple(
        (key, _short(value))
        for key, value in settings.get("settings", {}).items()
        if value not in (None, [], {})
    )
    tables.append(TableView(f"Settings of {folder.name}", ("key", "value"), shown))
    numbers = {"stages": {id_: done["counts"] for id_, done in records}, "made_of": settings}
    return Section("provenance", "Where it comes from", (check,), numbers, tables=tuple(tables))


def _check(stage: StageFolder) -> Check:
    advice = "restore the files, or make the stage again: prefopt data build … --from " + stage.id
    try:
        done = stage.done()
        if done is None:
            return Check(
                "manifest",
                "look",
                "the stage is not finished",
                advice="run its pipeline to the end",
            )
        for shard in stage.output(done).files:
            read_shard(shard)
    except DataError as error:
        return Check("manifest", "stop", str(error), advice=advice)
    recorded = {shard["file"] for shard in done["shards"]}
    others = sorted(
        p.name for p in stage.shards.iterdir() if p.is_file() and not p.name.startswith(".")
    )
    unknown = [name for name in others if name not in recorded]
    if unknown:
        return Check(
            "manifest",
            "stop",
            f"{unknown[0]} is no shard of this stage",
            advice="move it elsewhere",
        )
    return Check("manifest", "ok", f"{len(recorded):,} shards are what their records say")


def _quietly(stage: StageFolder) -> dict[str, Any] | None:
    try:
        return stage.done()
    except DataError:
        return None  # of another stage: its own card says so


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_CHARS else f"{text[: _MOST_CHARS - 1]}…"
