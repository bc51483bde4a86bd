"""Reading rows: every file kind gives the same rows, and what cannot be read is named."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from prefopt.data.readers import READERS
from prefopt.data.sources import HubRows, open_source
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.checks.files import hub_is_not_asked
from prefopt.recipe.checks.rules import Surroundings
from prefopt.recipe.local_paths import DATA_SUFFIXES
from prefopt.recipe.schema import Recipe, SourceSection

ROWS = [
    {"prompt": "p1", "chosen": 'line one\nline two, "quoted"', "rejected": "ñ\u2028é"},
    {"prompt": "p2", "chosen": "c2", "rejected": "r2"},
]


def write(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    """Writes ``rows`` as the kind of file its name says, with the library everyone uses for it."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".jsonl"):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif name.endswith(".json"):
            json.dump(rows, file, indent=2)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path: Path | str, **settings: str) -> list[dict[str, str]]:
    return [row.data for row in open_source(SourceSection(path=str(path), **settings)).rows()]


KINDS = ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"]


@pytest.mark.parametrize("name", KINDS)
def test_every_file_kind_gives_the_rows_that_were_written(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name)) == ROWS


def test_json_lines_under_a_json_name_are_read_as_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert read(path) == ROWS


def test_a_byte_order_mark_is_not_part_of_the_first_column_name(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.json"):
        path = write(tmp_path / name)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert read(path) == ROWS, name


def test_csv_fields_longer_than_the_csv_modules_default_limit_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "x" * 200_000, "rejected": "r"}]
    assert read(write(tmp_path / "a.csv", rows)) == rows


def test_a_directory_and_a_glob_give_all_files_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", [{"prompt": "b"}])
    write(tmp_path / "a.parquet", [{"prompt": "a"}])
    (tmp_path / "README.md").write_text("not data")
    assert [row["prompt"] for row in read(tmp_path)] == ["a", "b"]
    assert [row["prompt"] for row in read(tmp_path / "*.jsonl")] == ["b"]


def test_rows_of_equally_named_files_keep_distinct_names(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train.jsonl", [{"prompt": folder}])
    rows = open_source(SourceSection(path=str(tmp_path / "*" / "train.jsonl"))).rows()
    assert [row.where for row in rows] == ["x/train.jsonl:1", "y/train.jsonl:1"]


def test_relative_paths_resolve_against_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert read("a.jsonl") == ROWS


def fails(path: Path | str, *parts: str, **settings: str) -> None:
    """Reading ``path`` raises a DataError that says all of ``parts``."""
    with pytest.raises(DataError) as error:
        read(path, **settings)
    for part in parts:
        assert part in str(error.value), f"{part!r} not in {error.value}"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_broken_json_line_is_named_with_file_and_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    opened = gzip.open if name.endswith(".gz") else open
    with opened(path, "at") as file:
        file.write('\n{"prompt": "p", "chosen": }\n')  # line 3 is blank, line 4 is broken
    fails(path, f"{path}:4", "broken JSON")


def test_a_broken_json_array_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"prompt": "p"},\n{"prompt": oops}\n]')
    fails(path, f"{path}:3", "broken JSON")


def test_a_row_that_is_no_object_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p"}\n["p", "c"]\n')
    fails(path, f"{path}:2", "an array of 2")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = (
        '[\n{"prompt": "caf\xe9"}\n]'
        if name == "a.json"
        else '{"prompt": 1}\n{"prompt": "caf\xe9"}\n'
    )
    path.write_bytes(text.encode("latin-1"))
    fails(path, str(path), "not UTF-8") if name == "a.csv" else fails(
        path, f"{path}:2", "not UTF-8"
    )


def test_a_csv_row_with_too_many_fields_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen\np,c\np,c,d\n")
    fails(path, f"{path}:3", "3 fields", "names 2")


def test_a_damaged_archive_and_a_damaged_parquet_file_are_named(tmp_path: Path) -> None:
    cut = write(tmp_path / "a.jsonl.gz", ROWS * 500)
    cut.write_bytes(cut.read_bytes()[:100])
    fails(cut, str(cut), "gzip archive is damaged")
    fake = tmp_path / "b.jsonl.gz"
    fake.write_text("plain text")
    fails(fake, str(fake), "is named .gz and is no gzip archive")
    parquet = tmp_path / "a.parquet"
    parquet.write_bytes(b"PAR1 nonsense PAR1")
    fails(parquet, str(parquet), "not a readable Parquet file")


def test_a_missing_file_names_the_nearest_one_there_is(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    fails(tmp_path / "trian.jsonl", "no such file", "did you mean 'train.jsonl'")
    fails(tmp_path / "none" / "a.jsonl", "no directory")
    fails(tmp_path / "*.csv", "matches no")


def test_a_directory_of_splits_is_not_read_as_one_set(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.parquet")
    fails(tmp_path, "directly in this directory", "pattern")


def test_hub_settings_on_a_local_file_are_an_error_not_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"split = 'train'.*only for hub data sets"):
        open_source(SourceSection(path=str(path), split="train"))


def test_a_hub_data_set_gives_the_rows_of_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list(ROWS)
    asked = {}

    def load(path: str, subset: str | None, **kwargs: str | None) -> datasets.Dataset:
        asked.update(path=path, subset=subset, **kwargs)
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    section = SourceSection(path="org/pairs", subset="s", split="train_prefs", revision="abc")
    source = open_source(section)
    assert asked == {"path": "org/pairs", "subset": "s", "split": "train_prefs", "revision": "abc"}
    assert isinstance(source, HubRows)
    assert [row.data for row in source.rows()] == ROWS
    assert source.identity() == ["org/pairs", table._fingerprint]


def test_a_hub_data_set_with_several_splits_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train_prefs": table, "test_prefs": table})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    fails("org/pairs", "several splits", "train_prefs, test_prefs")


def test_a_hub_data_set_that_does_not_exist_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'org/pairs' doesn't exist on the Hub"
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    fails("org/pairs", "org/pairs", "cannot be loaded", "doesn't exist on the Hub")


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("org/pairs", False), ("pairs", False), ("org/pairs.v2", False), ("org-1/a_b", False),
        ("pairs.jsonl", True), ("org/pairs.json.gz", True), ("a/b/c", True), ("data/*.parquet", True),
        ("my pairs", True), ("./pairs", True), ("~/pairs", True), ("/pairs", True), ("here", True),
        ("s3://b/k", True),
        ("org/train-[0-9]", True),
    ],
)  # fmt: skip
def test_check_and_training_agree_what_is_local(
    path: str, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `prefopt check` takes for the hub, a run asks the hub for, and the other way round."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    asked: list[str] = []

    def load_dataset(name: str, *_: object, **__: object) -> datasets.Dataset:
        asked.append(name)
        return datasets.Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    section = SourceSection(path=path)
    try:
        open_source(section)
    except DataError as error:
        assert not asked, error
    assert bool(asked) is not local
    recipe = {
        "model": {"path": "org/m"}, "data": {"train": [section]}, "stage": "sft",
        "train": {"learning_rate": 1e-6}, "run": {"output_dir": "out"},
    }  # fmt: skip
    noted = [each.text for each in hub_is_not_asked(Recipe.model_validate(recipe), Surroundings())]
    assert any(path in text.split(": ")[1].split(", ") for text in noted) is not local


def test_every_kind_of_file_that_is_read_says_that_a_path_is_meant() -> None:
    assert set(DATA_SUFFIXES) == READERS.keys()
