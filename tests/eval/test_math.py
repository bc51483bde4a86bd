"""MATH-500: the reference solutions, wrong answers, answers that never end."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from eval.base import Answer, Row
from eval.registry import make_task
from prefopt.errors import DataError
from tests.eval.runs import write_jsonl


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _read(path: Path, **options: Any) -> list[Row]:
    return make_task("math", options).read(path)[""]


def test_reference_solutions_are_right_and_those_of_other_problems_wrong(
    shared_data: Path, tmp_path: Path
) -> None:
    """All 500; of those of the next problem, only two that box the very same answer."""
    rows = _rows(shared_data / "misc" / "MATH500.jsonl.gz")
    own = [{**row, "model": "own", "response": row["solution"]} for row in rows]
    following = zip(rows, rows[1:] + rows[:1], strict=True)
    other = [{**row, "model": "next", "response": each["solution"]} for row, each in following]
    task = make_task("math", {})
    found = task.read(write_jsonl(tmp_path / "responses.jsonl", own + other))
    right, wrong = task.summarise(found["own"]), task.summarise(found["next"])
    assert right.counts == {"n": 500, "n_correct": 500}
    assert right.metrics["accuracy"].value == 100
    same = sum(a["answer"] == b["answer"] for a, b in zip(rows, rows[1:] + rows[:1], strict=True))
    assert same <= wrong.counts["n_correct"] <= same + 1  # math-verify reads x=5 as 5
    assert set(right.groups) >= {"Level 1", "Level 5", "Algebra", "Number Theory"}


def test_answers_are_asked_for_in_a_box_and_decoded_greedily(shared_data: Path) -> None:
    task = make_task("math", {"data": str(shared_data / "misc" / "MATH500.jsonl.gz")})
    examples = task.examples()
    assert len(examples) == 500 and examples[0].key == "test/precalculus/807.json"
    assert "\\boxed{}" in examples[0].prompt[0]["content"]
    preset = task.decoding(examples[0])
    assert (preset.temperature, preset.max_new_tokens) == (0.0, 2048)


def test_groups_are_means_by_level_and_subject(tmp_path: Path) -> None:
    rows = [
        ("1", "Level 1", "Algebra", "\\boxed{4}"),
        ("2", "Level 1", "Geometry", "\\boxed{5}"),
        ("3", "Level 2", "Algebra", "It is $4$."),
    ]
    path = write_jsonl(
        tmp_path / "r.jsonl",
        [
            {"unique_id": key, "level": level, "subject": subject, "answer": "4", "response": text}
            for key, level, subject, text in rows
        ],
    )
    summary = make_task("math", {}).summarise(_read(path))
    assert {name: values["accuracy"] for name, values in summary.groups.items()} == {
        "Level 1": 50,
        "Level 2": 100,
        "Algebra": 100,
        "Geometry": 0,
    }


def test_answer_that_never_ends_is_wrong_and_counted_and_the_next_is_scored(tmp_path: Path) -> None:
    texts = ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{3}", None]
    path = write_jsonl(
        tmp_path / "r.jsonl",
        [{"problem": f"q{n}", "answer": "3", "response": text} for n, text in enumerate(texts)],
    )
    rows = _read(path, timeout_s=4.0)  # a thousand times what the second one needs
    assert [row.values["accuracy"] for row in rows] == [0.0, 1.0, 0.0]
    assert [row.problem for row in rows] == ["timeout", None, "null_response"]


def test_gold_answer_that_cannot_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    golds = ["$ $", "3"]
    path = write_jsonl(
        tmp_path / "r.jsonl",
        [
            {"problem": f"q{n}", "answer": gold, "response": "\\boxed{3}"}
            for n, gold in enumerate(golds)
        ],
    )
    summary = make_task("math", {}).summarise(_read(path))
    assert summary.metrics["accuracy"].value == 100
    assert summary.counts == {"n": 2, "n_correct": 1, "num_gold_unreadable": 1}


def test_second_answer_to_a_problem_is_refused_naming_both_lines(tmp_path: Path) -> None:
    row = {"unique_id": "a", "answer": "3", "response": "3"}
    path = write_jsonl(tmp_path / "r.jsonl", [row, {**row, "unique_id": "b"}, row])
    with pytest.raises(DataError, match=r"r\.jsonl:3: a second answer .* r\.jsonl:1"):
        _read(path)


def test_file_without_answers_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"unique_id": "a", "answer": "3", "text": "3"}])
    with pytest.raises(
        DataError, match="no column 'response'; its columns: unique_id, answer, text"
    ):
        _read(path)


def test_process_is_started_once_and_ended_with_the_task(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"problem": "1 + 2", "answer": "3"}])
    task = make_task("math", {"data": str(data)})
    example = task.examples()[0]
    before, rows, started = set(psutil.Process().children()), [], []
    for text in ("\\boxed{3}", "\\boxed{4}"):
        rows.append(task.row(example, [(Answer(text),)], {}))
        started.append(set(psutil.Process().children()) - before)
    task.close()
    assert [row.values["accuracy"] for row in rows] == [1.0, 0.0]
    assert len(started[0]) == 1 and started[0] == started[1]
    assert not started[0] & set(psutil.Process().children())
