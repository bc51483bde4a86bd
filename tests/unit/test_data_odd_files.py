"""Odd text and odd files: each is an error with file and line, or a row that is counted; none is a traceback."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from prefopt.cli import main
from prefopt.data import opening
from prefopt.data.messages import messages
from prefopt.data.readers import RawRow, read_rows
from prefopt.data.sources import first_rows, open_source, sound_rows
from prefopt.errors import DataError
from prefopt.recipe.schema import SourceSection
from prefopt.storage.json_text import (
    BadJson,
    half_surrogate,
    may_hold_halves,
    not_json,
    parse_items,
    parse_json,
)
from tests.unit.test_data_sources import ROWS, fails, read, write
from tests.unit.test_show import recipe

__all__ = ["recipe"]  # a fixture

HALF = "\\ud83d"
"""Half of a pair as JSON escapes it: what cutting a text after so many UTF-16 units leaves."""


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("9" * 5000, "5,000 digits"),
        ("-" + "1" + "0" * 400, "beyond what a float holds"),
        ("1e400", "beyond what a float holds"),
        ("[" * 5000 + "]" * 5000, "nested more than"),
        ("[" * 500 + "]" * 500, "nested more than"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' is given twice"),
        ('{"a": 1} x', "Extra data"),
        ("\x00", "Expecting value"),
        ("", "Expecting value"),
    ],
)
def test_json_that_no_reader_can_hold_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(BadJson, match=reason):
        parse_json(text)


def test_json_is_read_as_the_standard_library_reads_it() -> None:
    for value in ({"a": [1, -2.5e3, None, True, "\x00 \u2028 😀"]}, [], 18446744073709551615, "x"):
        for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=2) + "\r\n "):
            assert parse_json(text) == value


def test_items_of_an_array_come_one_at_a_time_and_the_good_ones_before_the_bad() -> None:
    text = ' [ {"a": 1} ,\n[2], oops]'
    items = parse_items(text)
    assert (next(items), next(items)) == ({"a": 1}, [2])
    with pytest.raises(BadJson) as error:
        next(items)
    assert error.value.position == text.index("oops")
    assert (list(parse_items("[]")), list(parse_items("[1]\n"))) == ([], [1])
    for text in ("[1", "[1 2]", "[1,]", "[1] 2", "["):
        with pytest.raises(BadJson):
            list(parse_items(text))


def test_half_a_surrogate_pair_is_found_at_every_depth_and_a_whole_pair_is_text() -> None:
    assert half_surrogate(json.loads('{"a": ["x", {"b\\ud83d": 1}]}')) == "a.1.b\\ud83d"
    text = '{"a": "\\ud83d\\ude00"}'
    assert may_hold_halves(text) and half_surrogate(parse_json(text)) is None
    assert not may_hold_halves('{"a": "\\u00e9 😀 ud83d"}')


def test_what_json_cannot_hold_is_named_with_its_place() -> None:
    import datetime

    assert not_json({"a": [1, "x", None, 2.5, True]}) is None
    assert not_json({"a": {"b": float("nan")}}) == "a.b is nan"
    assert not_json([datetime.date(2024, 1, 1)]) == "0 is of the type date"
    assert not_json({"a": b"x"}) == "a is of the type bytes"


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
@pytest.mark.parametrize(
    ("column", "said"),
    [
        ('"n": ' + "9" * 5000, "5,000 digits"),
        ('"n": 1e999', "beyond what a float holds"),
        ('"prompt": "again"', "the key 'prompt' is given twice"),
        ('"deep": ' + "[" * 2000 + "]" * 2000, "nested more than"),
    ],
)
def test_a_line_of_odd_json_is_named(tmp_path: Path, name: str, column: str, said: str) -> None:
    lines = ['{"prompt": "p"}', f'{{"prompt": "q", {column}}}']
    text = "[" + ",\n".join(lines) + "]" if name == "a.json" else "\n".join(lines)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    where = f"{path}, row 2" if name == "a.json" else f"{path}:2"
    fails(path, where, "broken JSON", said)


def test_rows_are_text_as_it_is(tmp_path: Path) -> None:
    """NUL, line separators, CRLF within a text, a byte-order mark within one: none of them is a fault."""
    rows = [
        {"prompt": text, "n": 2**64} for text in ("\x00", "a\r\nb\u2028c\x85", "\ufeffx", "\x1b[1m")
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\r\n".join(json.dumps(r, ensure_ascii=False).encode() for r in rows))
    assert read(path) == rows
    assert read(write(tmp_path / "b.csv", [{"prompt": r["prompt"]} for r in rows])) == [
        {"prompt": r["prompt"]} for r in rows
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_surrogate_pair_is_a_flaw_of_its_row(tmp_path: Path, name: str) -> None:
    lines = [f'{{"prompt": "{text}"}}' for text in ("a", f"b {HALF}", "c \\ud83d\\ude00")]
    path = tmp_path / name
    path.write_text(f"[{','.join(lines)}]" if name == "a.json" else "\n".join(lines))
    source = open_source(SourceSection(path=str(path)))
    flaws = [row.flaw for row in first_rows(source, None)]
    assert flaws == [None, "column 'prompt' holds half of a surrogate pair", None]
    with pytest.raises(DataError, match=r"a\.jsonl?:2: column 'prompt' holds half"):
        list(sound_rows(source.rows()))


# --- files ---------------------------------------------------------------------------------------


def _gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress(b'{"prompt": "p"}'))


def _utf16(path: Path) -> None:
    path.write_text('{"prompt": "p"}', encoding="utf-16")


def _pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def _parquet(path: Path) -> None:
    write(path.with_suffix(".parquet")).rename(path)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("a.jsonl", _gzipped, "a gzip archive; give its name the ending .gz"),
        ("a.json", _gzipped, "a gzip archive"),
        ("a.csv", _gzipped, "a gzip archive"),
        ("a.parquet", _gzipped, "a gzip archive"),
        ("a.jsonl", _utf16, "UTF-16 text; convert it with iconv"),
        ("a.csv", _utf16, "UTF-16 text"),
        ("a.jsonl", _parquet, "a Parquet file; give its name the ending .parquet"),
        ("a.parquet", _pointer, "a Git LFS pointer in place of the file; run git lfs pull"),
        ("a.jsonl", _pointer, "a Git LFS pointer"),
    ],
)
def test_a_file_of_another_kind_says_which(
    tmp_path: Path, name: str, make: Callable[[Path], None], said: str
) -> None:
    make(tmp_path / name)
    fails(tmp_path / name, str(tmp_path / name), said)
    open_source(SourceSection(path=str(tmp_path / name))).num_rows()  # for a bar: never in the way


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.json.gz"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert read(tmp_path / name) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_cut_parquet_file_is_named_and_does_not_stop_the_count(
    tmp_path: Path, share: float
) -> None:
    path = write(tmp_path / "a.parquet", ROWS * 50)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    source = open_source(SourceSection(path=str(path)))
    assert source.num_rows() is None
    fails(path, str(path), "not a readable Parquet file")


def test_a_value_of_a_parquet_file_that_python_cannot_hold_is_named_with_its_row(
    tmp_path: Path,
) -> None:
    days = pyarrow.array(numpy.array([0, 1, 10_000_000], numpy.int32)).cast(pyarrow.date32())
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["a", "b", "c"], "day": days}), tmp_path / "a.parquet"
    )
    fails(tmp_path / "a.parquet", "a.parquet, row 3", "cannot be read")
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.py_buffer(numpy.array([0, 1, 2], numpy.int32)), pyarrow.py_buffer(b"a\xff")],
    )
    pyarrow.parquet.write_table(pyarrow.table({"prompt": bad}), tmp_path / "b.parquet")
    fails(tmp_path / "b.parquet", "b.parquet, row 2", "utf-8")


def test_an_archive_made_to_fill_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_ANY_TIMES_BYTES", 1 << 16)
    path = tmp_path / "a.jsonl.gz"
    for filling in (b" ", b"\n"):  # one endless line, and endless lines
        path.write_bytes(gzip.compress(filling * (1 << 22)))
        fails(path, str(path), "expands to more than 500 times its size")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b"[" + b" " * (1 << 22)))
    fails(tmp_path / "b.json.gz", "expands to more than")


def test_a_directory_under_a_files_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "x" / "a.jsonl").mkdir(parents=True)
    fails(tmp_path / "x" / "*.jsonl", "Is a directory")


def test_a_file_name_that_is_not_utf8_can_be_written_into_the_list_of_rejects(
    tmp_path: Path,
) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(path, "w") as file:
        file.write('{"prompt": "p"}')
    (row,) = open_source(SourceSection(path=str(tmp_path))).rows()
    assert row.where.encode() == b"caf\\udce9.jsonl:1"


# --- through the command -------------------------------------------------------------------------


def test_half_a_surrogate_pair_is_a_counted_reject_of_training(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = f'{{"chosen": "hi {HALF}", "rejected": "no", "prompt": "p"}}'
    whole = '{"chosen": "hi \\ud83d\\ude00", "rejected": "no", "prompt": "p"}'
    (tmp_path / "odd.jsonl").write_text(f"{half}\n{whole}\n{half}\n")
    override = f"data.train=[{{path: {tmp_path}/odd.jsonl, format: text, columns: {{id: prompt}}}}]"
    assert main([*recipe, override]) == 0
    shown = capsys.readouterr()
    assert "broken_text" in shown.out and "2" in shown.out
    rejects = next((tmp_path / "cache").rglob("rejects.jsonl")).read_text().splitlines()
    lines = [json.loads(line) for line in rejects]
    assert [(line["row"], line["reason"], line["id"]) for line in lines] == [
        (1, "broken_text", "odd.jsonl:1"),
        (3, "broken_text", "odd.jsonl:3"),
    ]
    assert lines[0]["detail"] == "column 'chosen' holds half of a surrogate pair"


def test_a_part_of_a_message_that_is_null_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": [null]}]}\n')
    row = RawRow("rows.jsonl", 1, json.loads(path.read_text()))
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: column 'messages': the content of a message"
    ):
        messages(row, "chat", "messages", row.data["messages"], "user")


def test_a_column_of_a_parquet_file_whose_name_is_damaged_is_said_of_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), path)
    path.write_bytes(path.read_bytes().replace(b"prompt", b"pro\xffpt"))
    with pytest.raises(DataError, match=r"rows\.parquet"):
        list(read_rows(path, "rows"))
