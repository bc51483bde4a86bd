"""Parquet shards of a stage have one schema, whatever each of them lacks; what has no type is named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow.dataset
import pyarrow.parquet
import pytest

from data_pipelines.parquet_shards import common_schema, parquet_bytes, without_nulls
from data_pipelines.shards import ShardFile, read_shard, write_shard
from prefopt.errors import DataError
from tests.eval.runs import write_jsonl
from tests.pipelines.pipelines import build, building, refused, rows, write_pipeline

MIXED: list[dict[str, Any]] = [
    {
        "prompt": f"p {n}",
        "answer": None if n < 20 else str(n),
        "meta": [{"b": "x"}, {"a": 1}, {}][n % 3],
        "list": [] if n < 40 else [{"k": None}, {"k": 1.5}],
        "share": n if n < 20 else n / 2,
    }
    for n in range(60)
]


def made(tmp_path: Path, lines: list[dict[str, Any]], **settings: Any) -> Path:
    file = write_jsonl(tmp_path / "rows.jsonl", lines)
    keep = [name for name in lines[0] if name != "prompt"]
    stages = [
        {"stage": "prompts", "sources": [{"path": str(file), "format": "text"}], "keep": keep},
        {"stage": "filter", "min_prompt_chars": 1},
    ]
    return write_pipeline(tmp_path / "p.yaml", stages, format="parquet", shard_rows=20, **settings)


def schemas(folder: Path) -> list[Any]:
    files = sorted(folder.glob("*.parquet"))
    assert len(files) == 3
    return [pyarrow.parquet.read_schema(file) for file in files]


@pytest.mark.parametrize("stage", ["prompts", "filter"])  # a whole one, and a map one
def test_all_shards_of_a_stage_have_one_schema(tmp_path: Path, stage: str) -> None:
    folder = build(made(tmp_path, MIXED))
    first, *others = schemas(folder / stage)
    assert all(each.equals(first) for each in others)
    files = [str(path) for path in sorted((folder / stage).glob("*.parquet"))]
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "hub")
    )
    assert [without_nulls(dict(row)) | {"id": ""} for row in loaded] == [
        without_nulls(row) | {"id": ""} for row in MIXED
    ]
    assert not (folder / ".parts").exists() or not list((folder / ".parts").iterdir())


def test_a_shard_that_every_row_is_dropped_from_is_read_by_every_reader(tmp_path: Path) -> None:
    """`datasets` takes the batch size of the first row group, and 0 rows are no size."""
    lines = [{**row, "prompt": "p" if 20 <= n < 40 else "pp"} for n, row in enumerate(MIXED)]
    lines = [{**row, "prompt": f"{row['prompt']} {n:02}"} for n, row in enumerate(lines)]
    path = made(tmp_path, lines)
    text = path.read_text().replace("min_prompt_chars: 1", "min_prompt_chars: 5")
    path.write_text(f"{text}- {{stage: filter, id: again, min_prompt_chars: 1}}\n")
    folder = build(path) / "filter"
    first, *others = schemas(folder)
    assert all(each.equals(first) for each in others)
    kept = [line["prompt"] for line in lines if line["prompt"].startswith("pp")]
    files = sorted(map(str, folder.glob("*.parquet")))
    cache = str(tmp_path / "hub")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    assert loaded["prompt"][:] == kept
    assert pyarrow.dataset.dataset(files).to_table().column("prompt").to_pylist() == kept
    assert [x for file in files for x in pandas.read_parquet(file)["prompt"]] == kept
    later = sorted(map(str, (folder.parent / "again").glob("*.parquet")))
    assert pyarrow.dataset.dataset(later).to_table().column("prompt").to_pylist() == kept


def test_a_column_that_the_first_row_lacks_is_kept() -> None:
    first, second = {"id": "a", "n": 1}, {"id": "b", "n": 2, "num_empty": 1}
    schema = common_schema([[first, second]], "s")
    assert schema.names == ["id", "n", "num_empty"]
    assert parquet_bytes([first, second], schema, "s") == parquet_bytes(
        [first, second], schema, "s"
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, "x"], "row 1: column 'v'"),
        ([True, 1], "row 1: column 'v'"),
        ([{"a": 1}, {"a": "x"}], "row 1: column 'v'"),
        ([1, [1]], "row 1: column 'v'"),
        ([2**70], "row 0: column 'v'"),
        ([2**60 + 1, 0.5], "column 'v'"),
        ([{}, {}], "column 'v' holds {} in every row"),
        ([[{}], [{"a": {}}]], "column 'v.a' holds {} in every row"),
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_what_has_no_type_of_parquet_is_named(values: list[Any], said: str, apart: bool) -> None:
    found = [{"id": str(n), "v": value} for n, value in enumerate(values)]
    shards = [[row] for row in found] if apart else [found]
    with pytest.raises(DataError) as error:
        schema = common_schema(shards, "s")
        for each in shards:
            parquet_bytes(each, schema, "s")
    assert said in str(error.value) and "'s'" in str(error.value)


@pytest.mark.parametrize(
    "deaths", [(5, 12, 20), pytest.param(range(1, 40), marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_a_build_that_is_killed_while_its_shards_become_parquet_goes_on(
    tmp_path: Path, deaths: Sequence[int]
) -> None:
    calm = build(made(tmp_path, MIXED))
    files = {path.name: path.read_bytes() for path in (calm / "filter").glob("*.parquet")}
    (tmp_path / "b").mkdir()
    for step in deaths:
        pipeline = made(tmp_path / "b", MIXED, output_dir=str(tmp_path / "b" / f"out-{step}"))
        with building(pipeline, dies_at=step) as process:
            process.join()
        build(pipeline)
        folder = tmp_path / "b" / f"out-{step}"
        assert {p.name: p.read_bytes() for p in (folder / "filter").glob("*.parquet")} == files
        assert rows(folder / "filter") == rows(calm / "filter")


def test_a_row_that_a_stage_makes_and_no_json_can_hold_is_named(tmp_path: Path) -> None:
    for value, said in ((float("nan"), "column score is nan"), ("\ud83d", "half a surrogate pair")):
        shard = [{"id": "a"}, {"id": "file.jsonl:7", "score": value}]
        with pytest.raises(DataError, match=r"stage 'score', row 'file\.jsonl:7': ") as error:
            write_shard(tmp_path / "score" / "00000.jsonl", shard)
        assert said in str(error.value)


def test_values_of_two_types_stop_the_build_with_the_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "a", "v": 1}, {"prompt": "b", "v": "x"}]
    said = refused(capsys, made(tmp_path, lines), code=1)
    assert "stage 'prompts', row rows.jsonl:2: column 'v'" in said and "format: jsonl" in said


def test_shards_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = write_shard(tmp_path / "s" / "00000.jsonl", MIXED)
    assert read_shard(file) == MIXED
    assert [json.loads(line) for line in file.path.open()] == MIXED
    with pytest.raises(DataError, match="was changed since"):
        read_shard(ShardFile(file.path, file.rows, "0" * 64))
