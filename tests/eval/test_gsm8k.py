"""GSM8K: OpenAI's labels of two models' solutions, and files that must be refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from eval.base import Answer
from eval.registry import make_task
from prefopt.cli import main
from prefopt.errors import DataError
from tests.eval.runs import write_jsonl


def test_published_solutions_are_right_exactly_where_openai_labelled_them(
    shared_data: Path,
) -> None:
    path = shared_data / "gsm8k" / "example_model_solutions.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        labels = [json.loads(line) for line in file]
    task = make_task("gsm8k", {})
    found = task.read(path)
    counts = {"6b_finetuning": 286, "175b_verification": 742}
    for model, right in counts.items():
        assert task.summarise(found[model]).counts["n_correct"] == right
        scored = [row.values["accuracy"] for row in found[model]]
        assert scored == [float(each[model]["is_correct"]) for each in labels]
        assert task.summarise(found[model]).metrics["accuracy"].value == pytest.approx(
            right / 13.19
        )


def test_gold_solutions_of_the_test_set_are_right(shared_data: Path) -> None:
    task = make_task("gsm8k", {"data": str(shared_data / "gsm8k" / "test.jsonl.gz")})
    examples = task.examples()
    rows = [task.row(each, [(Answer(each.fields["answer"]),)], {}) for each in examples]
    assert task.summarise(rows).counts == {"n": 1319, "n_correct": 1319}


def test_missing_answers_are_wrong_and_counted(tmp_path: Path) -> None:
    texts = ["#### 3", None, "no idea"]
    path = write_jsonl(
        tmp_path / "r.jsonl",
        [{"question": f"q{n}", "answer": "#### 3", "response": t} for n, t in enumerate(texts)],
    )
    task = make_task("gsm8k", {})
    summary = task.summarise(task.read(path)[""])
    assert summary.metrics["accuracy"].value == pytest.approx(100 / 3)
    assert summary.counts == {"n": 3, "n_correct": 1, "num_no_number": 1, "num_null_response": 1}


def test_second_answer_to_a_question_is_refused_naming_both_lines(tmp_path: Path) -> None:
    row = {"question": "1 + 2?", "answer": "#### 3", "response": "#### 3"}
    path = write_jsonl(tmp_path / "r.jsonl", [row, {**row, "question": "2 + 1?"}, row])
    with pytest.raises(DataError, match=r"r\.jsonl:3: a second answer .*'1 \+ 2\?'.* r\.jsonl:1"):
        make_task("gsm8k", {}).read(path)


def test_two_models_may_answer_one_question(tmp_path: Path) -> None:
    row = {"question": "1 + 2?", "answer": "#### 3", "response": "#### 3"}
    path = write_jsonl(tmp_path / "r.jsonl", [{**row, "model": name} for name in ("a", "b")])
    assert set(make_task("gsm8k", {}).read(path)) == {"a", "b"}


def test_repeated_problem_in_the_data_is_refused(tmp_path: Path) -> None:
    row = {"question": "1 + 2?", "answer": "#### 3"}
    path = write_jsonl(tmp_path / "d.jsonl", [row, row])
    with pytest.raises(DataError, match=r"d\.jsonl:2: a second problem"):
        make_task("gsm8k", {"data": str(path)}).examples()


def test_half_a_surrogate_pair_in_a_file_to_score_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gsm8k.jsonl"
    row = '{"question": "q%s", "answer": "#### 3", "response": "#### 3"}\n'
    path.write_text(row % "" + row % " \\ud83d")
    assert main(["eval", "score", "gsm8k", str(path)]) == 1
    assert "gsm8k.jsonl:2: column 'question' holds half of" in capsys.readouterr().err
    assert main(["eval", "score", "gsm8k", str(tmp_path)]) == 1
    assert f"{tmp_path}: is a directory" in capsys.readouterr().err
