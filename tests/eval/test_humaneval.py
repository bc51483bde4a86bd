"""HumanEval: its own solutions, an estimator by hand, and every way in which an answer can go wrong."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.base import Answer, Example, Row
from eval.registry import make_task
from eval.tasks.humaneval import chat_program, completion_program, pass_at_k
from prefopt.errors import ConfigError, DataError
from tests.eval.runs import write_jsonl

ADD = {
    "task_id": "Own/0",
    "prompt": 'import math\n\n\ndef add(a, b):\n    """Sum, floored."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1.5, 2) == 3\n    assert candidate(0, 0) == 0\n",
}
NEGATE = {
    "task_id": "Own/1",
    "prompt": 'def negate(a):\n    """Minus a."""\n',
    "entry_point": "negate",
    "test": "def check(candidate):\n    assert candidate(2) == -2\n",
}
RIGHT, WRONG = "    return math.floor(a + b)\n", "    return a\n"


@pytest.fixture
def problems(tmp_path: Path) -> str:
    """A file of two problems."""
    return str(write_jsonl(tmp_path / "problems.jsonl", [ADD, NEGATE]))


def _samples(path: Path, rows: Sequence[tuple[str, str | None]]) -> Path:
    return write_jsonl(path, [{"task_id": key, "completion": text} for key, text in rows])


def _answered(task: Any, example: Example, *texts: str) -> Row:
    return task.row(example, [(Answer(text),) for text in texts], {})


def _broken(row: dict[str, str]) -> str:
    """The solution whose last ``return`` is a ``raise`` (an ``assert`` would leave one in an endless loop)."""
    head, _, tail = row["canonical_solution"].rpartition("return")
    return f"{head}raise{tail}"


def test_all_canonical_solutions_pass_and_none_does_with_one_token_broken(
    shared_data: Path, tmp_path: Path
) -> None:
    data = shared_data / "misc" / "HumanEval.jsonl.gz"
    with gzip.open(data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    task = make_task("humaneval", {"data": str(data), "timeout_s": 60.0})
    bodies = {"right": lambda row: row["canonical_solution"], "broken": _broken}
    samples = [
        {"task_id": row["task_id"], "model": model, "completion": body(row)}
        for model, body in bodies.items()
        for row in rows
    ]
    found = task.read(write_jsonl(tmp_path / "samples.jsonl", samples))
    right, broken = (task.summarise(found[model]) for model in bodies)
    assert right.counts == {"n": 164, "n_samples": 164, "n_passed": 164}
    assert right.metrics["pass@1"].value == 100
    assert broken.counts == {"n": 164, "n_samples": 164, "n_passed": 0, "num_failed": 164}


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (5, 2, 1, 2 / 5),
        (5, 2, 2, 1 - 3 / 10),  # 3 of the 10 pairs hold none of the 2 right ones
        (5, 2, 4, 1.0),  # any 4 of 5 hold one of 2
        (4, 0, 3, 0.0),
        (10, 3, 5, 1 - 21 / 252),  # C(7,5) = 21 of C(10,5) = 252
    ],
)
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer(
    n: int, c: int, k: int, expected: float
) -> None:
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)
    assert sum(map(any, draws)) / len(draws) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_not_the_biased_plug_in() -> None:
    """1 - (1 - c/n)^k, of 5 answers with 2 right and k = 2: 0.64, where 0.7 is unbiased."""
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)


def test_samples_of_one_problem_are_averaged_without_bias(problems: str, tmp_path: Path) -> None:
    """Two of four right and none of four: pass@2 is the mean of 1 - C(2,2)/C(4,2) = 5/6 and 0."""
    rows = [("Own/0", text) for text in (RIGHT, WRONG, WRONG, RIGHT)] + [("Own/1", WRONG)] * 4
    task = make_task("humaneval", {"data": problems, "samples": 4, "k": [2]})
    summary = task.summarise(task.read(_samples(tmp_path / "samples.jsonl", rows))[""])
    assert summary.metrics["pass@1"].value == pytest.approx(25)
    assert summary.metrics["pass@2"].value == pytest.approx(100 * 5 / 12)
    assert summary.counts == {"n": 2, "n_samples": 8, "n_passed": 2, "num_failed": 6}


def test_problems_without_an_answer_are_counted_and_said(problems: str, tmp_path: Path) -> None:
    task = make_task("humaneval", {"data": problems})
    summary = task.summarise(
        task.read(_samples(tmp_path / "samples.jsonl", [("Own/0", RIGHT)]))[""]
    )
    assert summary.metrics["pass@1"].value == 100
    assert summary.counts == {"n": 2, "n_samples": 1, "n_passed": 1, "num_no_answer": 1}
    assert "1 of 2 problems have no answer" in summary.notes[0]


def test_null_completion_fails_and_is_counted(problems: str, tmp_path: Path) -> None:
    rows = [("Own/0", None), ("Own/1", "    return -a\n")]
    task = make_task("humaneval", {"data": problems})
    summary = task.summarise(task.read(_samples(tmp_path / "samples.jsonl", rows))[""])
    assert summary.metrics["pass@1"].value == 50
    assert summary.counts["num_null_response"] == 1


def test_unknown_problem_is_refused_with_its_line(problems: str, tmp_path: Path) -> None:
    path = _samples(tmp_path / "samples.jsonl", [("Own/0", RIGHT), ("HumanEval/0", RIGHT)])
    with pytest.raises(DataError, match=r"samples\.jsonl:2: task_id = 'HumanEval/0'"):
        make_task("humaneval", {"data": problems}).read(path)


def test_fewer_answers_than_k_are_refused(problems: str, tmp_path: Path) -> None:
    task = make_task("humaneval", {"data": problems, "samples": 2, "k": [2]})
    path = _samples(tmp_path / "samples.jsonl", [("Own/0", RIGHT)] * 2 + [("Own/1", RIGHT)])
    with pytest.raises(DataError, match=r"Own/1 has 1 answers: pass@2"):
        task.read(path)
    with pytest.raises(ConfigError, match=r"tasks\.humaneval\.samples=10"):
        make_task("humaneval", {"data": problems, "samples": 5, "k": [1, 10]})


def test_program_that_never_ends_is_stopped_and_counted(problems: str) -> None:
    task = make_task("humaneval", {"data": problems, "mode": "complete", "timeout_s": 0.5})
    row = _answered(task, task.examples()[0], "    while True: pass\n")
    assert row.values == {"pass@1": 0.0}
    assert row.details["verdicts"] == {"timeout": 1}


def test_program_that_leaves_before_its_tests_fails(problems: str) -> None:
    task = make_task("humaneval", {"data": problems, "mode": "complete"})
    row = _answered(task, task.examples()[0], "    import os; os._exit(0)\n")
    assert row.details["verdicts"] == {"failed": 1}


@pytest.mark.parametrize(
    "text",
    [
        "Sure!\n```python\ndef add(a, b):\n    return math.floor(a + b)\n```\nIt floors.",
        "```python\ndef add(a, b):\n    return 0\n```\nBetter:\n```python\ndef add(a, b):\n"
        "    return math.floor(a + b)\n```",
        "def add(a, b):\n    return math.floor(a + b)",
        "```python\nreturn math.floor(a + b)\n```",
        "```\n    total = a + b\n    return math.floor(total)\n```",
    ],
    ids=["fence", "last fence", "no fence", "body", "indented body"],
)
def test_code_is_taken_from_a_chat_answer(problems: str, text: str) -> None:
    task = make_task("humaneval", {"data": problems})
    assert _answered(task, task.examples()[0], text).values == {"pass@1": 1.0}


def test_completion_ends_where_the_function_does(problems: str) -> None:
    """What a base model writes on after the function is cut: here it would raise."""
    task = make_task("humaneval", {"data": problems, "mode": "complete"})
    example = task.examples()[0]
    assert example.prompt == ADD["prompt"]
    tail = f"{RIGHT}\nprint(1 / 0)\ndef other(): return 1 / 0\n"
    assert _answered(task, example, tail).values == {"pass@1": 1.0}
    assert "1 / 0" in str(completion_program(example, tail))  # a file's completion is run as it is
    assert "import math" in chat_program(example, tail).before


def test_one_sample_is_greedy_and_several_are_drawn_as_in_the_paper(problems: str) -> None:
    one, many = (make_task("humaneval", {"data": problems, "samples": n}) for n in (1, 20))
    example = one.examples()[0]
    assert one.decoding(example).temperature == 0
    preset = many.decoding(example)
    assert (preset.num_samples, preset.temperature, preset.top_p) == (20, 0.8, 0.95)
