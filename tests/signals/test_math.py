"""Answers of mathematics: math-verify in its own process, and the number GSM8K ends with."""

from __future__ import annotations

import gzip
import json
import math
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from prefopt.errors import SignalError
from prefopt.recipe.registry import get_signal
from prefopt.signals.base import Signal
from prefopt.signals.line_workers import LineWorkers, WorkerDied, WorkerTimeout
from prefopt.signals.math import extract_number
from tests.signals.cases import candidates, scores


@pytest.fixture(scope="module")
def verifier() -> Iterator[Signal]:
    signal = get_signal("math").fn(num_workers=1)
    yield signal
    signal.close()


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        (r"\frac{1}{2}", r"So it is $\boxed{0.5}$.", True),
        (r"\frac{1}{2}", r"So it is $\boxed{\frac{2}{4}}$.", True),
        (r"\frac{1}{2}", r"So it is $\boxed{\frac{1}{3}}$.", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"Hence $\boxed{(3, \pi/2)}$", True),
        ("p - q", r"We get $\boxed{-q + p}$", True),
        (r"\$18.90", r"\boxed{18.9}", True),
        ("42", "The answer is 42", True),
        ("42", "The answer is 41", False),
        ("$42$", r"\boxed{42}", True),
        ("42", "", False),
    ],
)
def test_expressions_are_compared_by_value(
    verifier: Signal, gold: str, text: str, right: bool
) -> None:
    assert scores(verifier, text, answer=gold) == [float(right)]


def test_verifier_works_off_the_main_thread(verifier: Signal) -> None:
    """math-verify itself refuses: its time-outs are alarms, which Python allows in the main thread only."""
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.extend(scores(verifier, "7", "8", answer="7")))
    thread.start()
    thread.join(timeout=60)
    assert found == [1.0, 0.0]


def test_gold_answer_that_cannot_be_read_is_nan(verifier: Signal) -> None:
    assert math.isnan(scores(verifier, "42", answer="$ $")[0])


def test_math500_solutions_are_right_and_those_of_other_problems_wrong(
    verifier: Signal, shared_data: Path
) -> None:
    rows = _rows(shared_data / "misc" / "MATH500.jsonl.gz")[:80]
    pairs = list(zip(rows, rows[1:] + rows[:1], strict=True))
    found = verifier.score([candidates(r["solution"], o["solution"], fields=r) for r, o in pairs])
    assert [own for own, _ in found] == [1.0] * 80
    taken = [(r["answer"], o["answer"]) for (r, o), (_, x) in zip(pairs, found, strict=True) if x]
    assert [pair for pair in taken if pair[0] != pair[1]] == [("5", "x=5")]  # math-verify drops x=


@pytest.mark.parametrize(("solver", "right"), [("6b_finetuning", 286), ("175b_verification", 742)])
def test_gsm8k_solutions_are_scored_as_labelled(
    shared_data: Path, verifier: Signal, solver: str, right: int
) -> None:
    """All by their last number, and the first 200 by math-verify (which agrees on all, in 10 s)."""
    rows = _rows(shared_data / "gsm8k" / "example_model_solutions.jsonl.gz")
    gold = [row["ground_truth"].rsplit("A: ", 1)[1] for row in rows]  # published as "A: 18"
    groups = [
        candidates(row[solver]["solution"], fields={"answer": answer})
        for row, answer in zip(rows, gold, strict=True)
    ]
    labels = [[float(row[solver]["is_correct"])] for row in rows]
    assert get_signal("final_number").fn().score(groups) == labels
    assert sum(value for (value,) in labels) == right
    assert verifier.score(groups[:200]) == labels[:200]


def test_gsm8k_gold_solutions_end_in_their_own_number(shared_data: Path) -> None:
    rows = _rows(shared_data / "gsm8k" / "test.jsonl.gz")
    found = [extract_number(row["answer"]) for row in rows]
    assert found == [Decimal(row["answer"].split("#### ")[1].replace(",", "")) for row in rows]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7\n#### 70,000", "70000"),
        ("first 12, then 13", "13"),
        ("The answer is 5. (Not 6.)", "5"),
        ("It costs $1,250.50 in total.", "1250.50"),
        ("so x = -3", "-3"),
        (r"$\boxed{18}$ eggs in 2 days", "18"),
        ("about .5", ".5"),
        ("A: 18\nBut Q: 2", "18"),
        ("none", None),
    ],
)
def test_final_number_is_found(text: str, number: str | None) -> None:
    assert extract_number(text) == (None if number is None else Decimal(number))


def test_worker_that_hangs_or_dies_is_replaced_and_costs_its_own_answer_only() -> None:
    """The limit is short where no answer comes however long one waits, and long where one does."""
    workers = LineWorkers("tests.signals.odd_worker", 2)
    hung = workers.ask_all(["hang", "hang", "hang"], timeout_s=0.3)
    answers = workers.ask_all(["one", "die", "two", "three"], timeout_s=120.0)
    workers.close()
    assert all(isinstance(each, WorkerTimeout) for each in hung)
    assert answers[0] == "ONE" and answers[2:] == ["TWO", "THREE"]
    assert isinstance(answers[1], WorkerDied)


def test_worker_that_cannot_start_is_named() -> None:
    workers = LineWorkers("tests.signals.no_such_worker", 1)
    with pytest.raises(SignalError, match=r"python -m tests\.signals\.no_such_worker"):
        workers.ask_all(["x"], timeout_s=1.0)


def _rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
