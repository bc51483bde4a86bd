"""Verifiers that compare text."""

from __future__ import annotations

import math

import pytest
from pydantic import TypeAdapter, ValidationError

from prefopt.errors import DataError
from prefopt.recipe.registry import get_signal
from prefopt.signals.matching import extract_choice
from tests.signals.cases import scores


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        ("the answer is B", "B"),
        ("Answer: C", "C"),
        ("**Answer:** D", "D"),
        ("So $\\boxed{B}$.", "B"),
        ("$\\boxed{\\text{(A)}}$", "A"),
        ("First (A) seems right, but no: (C)", "C"),
        ("The answer is (A). No, wait: the answer is (D).", "D"),
        ("Because of this,\nB", "B"),
        ("Because of this,\n**B**", "B"),
        ("Because of this,\nB) the second", "B"),
        ("I think A is a letter and so am I", None),
        ("The answer is a fruit", None),
        ("The answer is Berlin", None),
        ("E", None),
        ("", None),
    ],
)
def test_choice_is_read_as_documented(text: str, letter: str | None) -> None:
    assert extract_choice(text) == letter


@pytest.mark.parametrize("gold", ["B", "b", "(B)", 1])
def test_multiple_choice_takes_letters_and_indices(gold: object) -> None:
    assert scores(get_signal("multiple_choice").fn(), "(B)", "(A)", "?", answer=gold) == [1, 0, 0]


def test_multiple_choice_gold_that_is_no_choice_is_nan() -> None:
    assert all(map(math.isnan, scores(get_signal("multiple_choice").fn(), "(B)", answer="F")))


def test_exact_match_ignores_outer_and_repeated_space_only() -> None:
    signal = get_signal("exact_match").fn()
    assert scores(signal, " a  b\n", "ab", "A b", "a b.", answer="a b") == [1, 0, 0, 0]


def test_exact_match_takes_any_of_several_golds_case_aside() -> None:
    signal = get_signal("exact_match").fn(ignore_case=True)
    assert scores(signal, "YES", "yeah", "no", answer=["yes", "Yeah"]) == [1, 1, 0]


def test_exact_match_compares_the_last_extract() -> None:
    signal = get_signal("exact_match").fn(extract=r"<answer>(.*?)</answer>")
    texts = ("<answer>1</answer> <answer>2</answer>", "2", "<answer>1</answer>")
    assert scores(signal, *texts, answer=2) == [1, 0, 0]


def test_regex_searches_the_whole_response() -> None:
    signal = get_signal("regex").fn(pattern=r"^ok\b")
    assert scores(signal, "ok then", "not ok", "okay") == [1, 0, 0]


def test_regex_that_backtracks_without_end_is_stopped() -> None:
    signal = get_signal("regex").fn(pattern=r"^(([a-z])+.)+[A-Z]([a-z])+$", timeout_s=0.2)
    assert scores(signal, "a" * 60) == [0.0]  # unstopped it takes years


def test_a_pattern_that_does_not_compile_is_refused_by_the_schema() -> None:
    annotation, _ = get_signal("regex").fields["pattern"]
    with pytest.raises(ValidationError, match="regular expression"):
        TypeAdapter(annotation).validate_python("(")


def test_a_missing_column_names_the_row_and_the_columns_there_are() -> None:
    with pytest.raises(DataError, match=r"row-7.*'answer'.*solution"):
        scores(get_signal("exact_match").fn(), "x", solution="x")


def test_a_dotted_column_descends() -> None:
    signal = get_signal("exact_match").fn(answer="meta.gold")
    assert scores(signal, "x", meta={"gold": "x"}) == [1.0]
