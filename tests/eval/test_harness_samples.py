"""lm-evaluation-harness's sample files, read by the tasks of the same name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.score import score_file
from prefopt.errors import DataError
from tests.eval.runs import write_jsonl


def sample(number: int, doc: dict[str, Any], said: Any, filter_: str = "none") -> dict[str, Any]:
    """A line as lm_eval 0.4 writes it: ``resps`` before, ``filtered_resps`` after a filter."""
    return {
        "doc_id": number, "doc": doc, "target": "…", "arguments": {"gen_args_0": {"arg_0": "…"}},
        "resps": [[said]] if isinstance(said, str) else said, "filtered_resps": ["[invalid]"],
        "filter": filter_, "metrics": ["exact_match"], "exact_match": 0.0, "doc_hash": "x",
    }  # fmt: skip


def gsm8k(number: int, said: Any, filter_: str) -> dict[str, Any]:
    doc = {"question": f"What is {number} + 1?", "answer": f"So #### {number + 1}"}
    return sample(number, doc, said, filter_)


def test_gsm8k_samples_count_each_problem_once_whatever_the_filters_say(tmp_path: Path) -> None:
    rows = [
        gsm8k(number, said, filter_)
        for filter_ in ("strict-match", "flexible-extract")
        for number, said in enumerate(["#### 1", "<think>2</think>It is 3", "#### 3"])
    ]
    found = score_file("gsm8k", write_jsonl(tmp_path / "samples_gsm8k.jsonl", rows), {})
    assert (found["n"], found["n_correct"]) == (3, 2)


def test_ifeval_samples_bring_their_instructions_along(tmp_path: Path) -> None:
    doc = {
        "key": 7,
        "prompt": "Say it without commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    rows = [
        sample(0, doc, "Well then."),
        sample(1, {**doc, "key": 8, "prompt": "Again."}, "Well, no."),
    ]
    found = score_file("ifeval", write_jsonl(tmp_path / "samples_ifeval.jsonl", rows), {})
    assert (found["n"], found["prompt_strict"]) == (2, 50)


@pytest.mark.parametrize("said", [[["1"], ["2"]], [[["-1.5", "False"]]], [], None, [[None]]])
def test_samples_without_one_text_are_refused_with_their_line(tmp_path: Path, said: Any) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", [gsm8k(0, "#### 1", "x"), gsm8k(1, said, "x")])
    with pytest.raises(DataError, match=r"s\.jsonl:2: resps = "):
        score_file("gsm8k", path, {})


def test_samples_of_two_runs_in_one_file_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", [gsm8k(0, "#### 1", "x"), gsm8k(0, "#### 2", "x")])
    with pytest.raises(DataError, match=r"s\.jsonl:2: doc_id 0 has another response .*s\.jsonl:1"):
        score_file("gsm8k", path, {})


@pytest.mark.parametrize(
    ("task", "row", "column"),
    [
        ("alpaca_eval2", {"preference": 1.5}, "'instruction'"),
        ("gsm8k", {"response": "x"}, "'question' or 'prompt' or 'key'"),
        ("math", {"response": "x"}, "'problem'"),
        ("mt_bench", {"turn": 1, "score": 3}, "'question_id'"),
    ],
)
def test_a_row_without_its_key_is_told_which_column_that_is(
    tmp_path: Path, task: str, row: dict[str, Any], column: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{column}.* is missing or empty"):
        score_file(task, path, {})
