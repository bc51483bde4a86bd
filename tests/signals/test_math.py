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
from tests.signals.readings import require_in_page, table


@pytest.fixture(scope="module")
def verifier() -> Iterator[Signal]:
    signal = get_signal("math").fn(num_workers=1)
    yield signal
    signal.close()


READ = [
    (r"\frac{1}{2}", r"So it is $\boxed{0.5}$.", 1),
    (r"\frac{1}{2}", r"$\boxed{\frac{2}{4}}$", 1),
    (r"\frac{1}{2}", r"$\boxed{\frac{1}{3}}$", 0),
    (r"\frac{1}{2}", "The answer is 2", 0),
    (r"\left( 3, \frac{\pi}{2} \right)", r"Hence $\boxed{(3, \pi/2)}$", 1),
    ("p - q", r"$\boxed{-q + p}$", 1),
    (r"\$18.90", r"\boxed{18.9}", 1),
    ("42", "The answer is 42", 1),
    ("42", "Answer: **42**", 1),
    ("42", "The answer is 41", 0),
    ("42", r"\boxed{41}. No: \boxed{42}", 1),
    ("$42$", r"\boxed{42}", 1),
    ("7", r"\boxed{3 + 4 = 7}", 1),
    ("5", r"\boxed{x = 5}", 1),
    ("-5", "It is \u22125.", 1),
    ("5", "It is \u22125.", 0),
    ("42", "\uff14\uff12", 1),
    ("x^2 + 1", "\\boxed{1 + x\u00b2}", 1),
    ("10000", r"\boxed{10\,000}", 1),
    (r"10\,000", r"\boxed{10000}", 1),
    ("10000", "10\u202f000", 1),
    ("10000", r"\boxed{10{,}000}", 1),
    ("3.5", r"\boxed{3{,}5}", 1),
    ("3.5", "3,5", 1),
    ("35", "3,5", 0),
    ("3,5", r"\boxed{5,3}", 1),
    ("3,5", r"\boxed{35}", 0),
    ("1.234,56", "1234.56", 1),
    ("1200", "1.2e3", 1),
    ("1200", "1.2 × 10^3", 1),
    ("1200", r"\boxed{1.2×10^3}", 1),
    (r"2\sqrt{3}", r"\boxed{2√3}", 1),
    (r"\sqrt{12}", r"\boxed{2√(3)}", 1),
    ("42", "<answer>42</answer>", 1),
    ("42", "<answer>41</answer>, not 42", 0),
    (r"2\sqrt{3}", r"<answer>2\sqrt{3}</answer>", 1),
    (r"\frac{1}{2}", r"<answer> $\frac{1}{2}$ </answer>", 1),
    ("42", "<answer>The answer is <b>42</b>.</answer> 6 * 7 = 42, 5 + 2 = 7", 1),
    ("x < 3", r"\boxed{x<3}", 1),
    ("\u20ac5", "5 \u20ac", 1),
    ("5 cm", r"\boxed{5\text{ m}}", 1),
    ("90^\\circ", r"\boxed{90}", 1),
    (r"50\%", r"\boxed{0.5}", 1),
    ("9.5", r"\boxed{9.5\%}", 1),
    (r"1\frac{1}{2}", r"\boxed{1.5}", 1),
    (r"0.\overline{3}", r"\boxed{\frac13}", 1),
    (r"0.1\overline{6}", r"\boxed{\frac16}", 1),
    (r"\frac13", "0.333333", 1),
    (r"\frac13", "0.33333", 0),
    (r"\pi", "3.14", 0),
    (r"\{3, 5\}", r"\boxed{\{5, 3\}}", 1),
    ("(3, 5)", r"\boxed{(5, 3)}", 0),
    ("[1, 2)", r"\boxed{[1, 2]}", 0),
    (r"\pm 3", r"\boxed{3, -3}", 1),
    (r"\pm 3", r"\boxed{3}", 0),
    (r"(-\infty, 3)", r"\boxed{(-\infty, 3)}", 1),
    (r"\infty", r"\boxed{-\infty}", 0),
    ("10^{-20}", r"\boxed{10^{-20}}", 1),
    ("10^{-20}", r"\boxed{10^{-21}}", 0),
    (r"\frac{1}{2^{99}}", r"\boxed{\frac{1}{2^{98}}}", 0),
    ("0.0000001", "0.0000002", 0),
    ("1000000.0000001", "1000000.0000002", 0),
    (r"\sqrt{2} \cdot 10^{-20}", r"\boxed{\sqrt{2} \cdot 10^{-21}}", 0),
    (r"\sqrt{8} \cdot 10^{-20}", r"\boxed{2\sqrt{2} \cdot 10^{-20}}", 1),
    ("(1, 10^{-20})", r"\boxed{(1, 10^{-21})}", 0),
    (r"\{10^{-20}\}", r"\boxed{\{10^{-21}\}}", 0),
    ("[0, 10^{-20}]", r"\boxed{[0, 10^{-21}]}", 0),
    ("x < 10^{-20}", r"\boxed{x < 10^{-21}}", 0),
    ("x = 10^{-20}", r"\boxed{x = 10^{-21}}", 0),
    ("1010_2", r"\boxed{1010_2}", 1),
    ("1010_2", r"\boxed{1010}", 1),
    ("1010_2", r"\boxed{1010_3}", 0),
    ("1010_2", r"\boxed{10}", 0),
    ("10", r"\boxed{1010_{\text{two}}}", 1),
    ("AB_{16}", r"\boxed{253_8}", 1),
    ("x_1", r"\boxed{x_2}", 0),
    ("9^{9^{9}}", r"\boxed{9^{9^{9}}}", 1),
    ("42", "", 0),
]


@pytest.mark.parametrize(("gold", "text", "score"), READ)
def test_expressions_are_compared_by_value(
    verifier: Signal, gold: str, text: str, score: int
) -> None:
    assert scores(verifier, text, answer=gold) == [float(score)]


def test_the_page_says_which_expressions_are_equal() -> None:
    require_in_page("math", table(("gold answer", "response", "score"), READ))


def test_a_tower_of_powers_costs_its_time_and_no_more() -> None:
    signal = get_signal("math").fn(num_workers=1, timeout_s=1.0)
    assert scores(signal, r"\boxed{9^{9^{9^{9}}}}", answer="5") == [0.0]
    signal.close()


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
