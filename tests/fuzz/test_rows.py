"""The reader of rows: whatever stands in a file, rows come, rejects are named, or an error says where."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from data_pipelines.contamination import EvalSet, eval_prompts
from data_pipelines.reading import kept_columns, source_rows
from data_pipelines.shards import write_shard
from eval.preference_data import pair_examples, prompt_examples
from prefopt.data.formats import canonical
from prefopt.data.rows import Refused, row_id
from prefopt.data.samples import SampleNeeds, SampleReader, Scaling, resolve_samples
from prefopt.data.sources import first_rows, open_source
from prefopt.errors import PrefoptError
from prefopt.recipe.schema import SourceSection
from prefopt.storage.json_text import half_surrogate
from tests.fuzz.mutations import as_json, fuzzed, mutated_bytes, mutated_value, steps

USER = {"role": "user", "content": "Wo steht das Rad? 🚲"}
PAIRS: list[dict[str, Any]] = [
    {"prompt": "p é", "chosen": "c", "rejected": "r", "score_chosen": 1.5, "score_rejected": None, "id": "a"},
    {"prompt": [USER], "chosen": [{"role": "assistant", "content": "da"}], "rejected": [
        {"role": "assistant", "content": [{"type": "text", "text": "dort"}]}], "id": 7},
    {"chosen": [USER, {"role": "assistant", "content": "a"}], "rejected": [USER, {"role": "assistant",
     "content": "b"}]},
    {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yo"},
     "rejected": {"from": "gpt", "value": "no"}},
    {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    {"prompt": "p", "response": "r", "reward": 0.25, "advantage": -1, "ended": True},
    {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f",
     "arguments": {"x": 1}}}]}], "tools": [{"type": "function"}]},
]  # fmt: skip


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


LINES = [b"\n".join(as_json(row) for row in [row, row]) for row in PAIRS]
FILES = {
    ".jsonl": LINES,
    ".json": [json.dumps([row, row], ensure_ascii=False, indent=1).encode() for row in PAIRS],
    ".csv": [_csv([{"prompt": 'a "b"\nc', "chosen": "x,y", "rejected": ""}] * 2),
             b"prompt,chosen,rejected\r\n1,2,3\r\n"],
    ".jsonl.gz": [gzip.compress(each, mtime=0) for each in LINES],
    ".parquet": [_parquet([row] * 3) for row in (PAIRS[0], PAIRS[1], PAIRS[4])],
}  # fmt: skip
FORMATS = ("auto", "text", "chat", "hh", "sharegpt")


def read(path: Path, form: str) -> None:
    """Reads a file every way that rows are read; what comes must be text that can be written."""
    columns = {"score_chosen": "score_chosen", "id": "id"} if "a" in form else {}
    section = SourceSection.model_validate({"path": str(path), "format": form, "columns": columns})
    for pairs in (True, False):
        _quietly(lambda pairs=pairs: _pipeline(path, section, pairs=pairs))
    _quietly(lambda: _samples(section))
    _quietly(lambda: pair_examples([section]))
    _quietly(lambda: prompt_examples([section]))
    _quietly(lambda: list(eval_prompts(EvalSet(path=str(path)))))


def _quietly(reading: Any) -> None:
    try:
        with steps():
            reading()
    except PrefoptError as error:
        str(error).encode()  # a terminal can show it


def _pipeline(path: Path, section: SourceSection, *, pairs: bool) -> None:
    open_source(section).num_rows()
    rows = []
    for row in source_rows([section], pairs=pairs):
        row.id.encode()
        if isinstance(row.found, Refused):
            assert row.found.detail is None or row.found.detail.encode()
            continue
        assert half_surrogate([row.found.prompt, list(row.found.responses)]) is None
        rows.append(
            {"id": row.id, "prompt": row.found.prompt, **kept_columns(row.raw, list(row.raw.data))}
        )
    write_shard(path.parent / "stage" / "00000.jsonl", rows)


def _samples(section: SourceSection) -> None:
    source = open_source(section)
    first = next(first_rows(source, 1), None)
    readings = () if first is None else resolve_samples(section, first, SampleNeeds(reward=True))
    reader = SampleReader(Scaling("sigmoid"))
    for raw in first_rows(source, None):
        for reading in readings:
            row = canonical(raw, reading)
            row_id(raw, reading.columns.id).encode()
            if not isinstance(row, Refused) and reading.labels is not None:
                reader(raw, row, reading.labels)


def check_file(folder: Path, case: tuple[str, bytes, str]) -> None:
    suffix, data, form = case
    path = folder / f"rows{suffix}"
    path.write_bytes(data)
    read(path, form)


def check_rows(folder: Path, case: tuple[list[Any], str]) -> None:
    rows, form = case
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(map(as_json, rows)))
    read(path, form)


FILE = st.sampled_from(sorted(FILES)).flatmap(
    lambda suffix: st.tuples(
        st.just(suffix), mutated_bytes(FILES[suffix]), st.sampled_from(FORMATS)
    )
)
ROWS = st.tuples(
    st.lists(st.one_of(mutated_value(PAIRS), st.sampled_from(PAIRS)), min_size=1, max_size=3),
    st.sampled_from(FORMATS),
)
test_files, test_many_files = fuzzed(FILE, check_file, share=0.5)
test_values, test_many_values = fuzzed(ROWS, check_rows, share=0.5)
