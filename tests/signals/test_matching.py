"""Verifiers that compare text."""

from __future__ import annotations

import math
import time

import pytest
from pydantic import TypeAdapter, ValidationError

from prefopt.errors import DataError
from prefopt.recipe.registry import get_signal
from prefopt.signals.matching import extract_choice
from tests.signals.cases import scores
from tests.signals.readings import require_in_page, table

READ = [
    ("<answer>B</answer>", "B"),
    ("<answer> B. Paris </answer>", "B"),
    ("It is <b>B</b>.\n\nThe answer is <strong>B</strong>.", "B"),
    ("(A) is wrong.\n<answer>\nB\n</answer>", "B"),
    ("B", "B"),
    ("b", "B"),
    ("b)", "B"),
    ("(b)", "B"),
    ("**B**", "B"),
    ("`B`", "B"),
    ("[B]", "B"),
    ("\uff22", "B"),
    ("Ⓑ", "B"),
    ("B.", "B"),
    ("B. Because of it.", "B"),
    ("B: the second", "B"),
    ("B\n\nA is wrong, since it is.", "B"),
    ("B.\n\nHere is why.", "B"),
    ("Because of this,\nB", "B"),
    ("Because of this,\n**B**", "B"),
    ("Because of this,\nB) the second", "B"),
    ("The answer is B.", "B"),
    ("the answer is b", "B"),
    ("The answer is (b).", "B"),
    ("The correct answer is option **(B)**.", "B"),
    ("The answer to this question is B", "B"),
    ("The answer is B because it is.", "B"),
    ("The answer is B, not A.", "B"),
    ("Answer: B", "B"),
    ("**Answer:** B", "B"),
    ("**Answer**: (B) the second", "B"),
    ("Answer: $\\text{B}$", "B"),
    ("Answer\n\nB", "B"),
    ("Option B", "B"),
    ("choice b", "B"),
    ("I choose B.", "B"),
    ("I would go with option B", "B"),
    ("Option B is correct.", "B"),
    ("(B) is the best answer, (A) and (C) are not.", "B"),
    ("So B is the correct answer.", "B"),
    ("The answer is not A but B.", "B"),
    ("\\boxed{B}", "B"),
    ("\\boxed{b}", "B"),
    ("\\boxed{(B)}", "B"),
    ("\\boxed{\\text{B}}", "B"),
    ("\\boxed{\\textbf{B}}", "B"),
    ("\\boxed{\\mathrm{B}}", "B"),
    ("\\boxed{\\textbf{(B) } 42}", "B"),
    ("$\\boxed{B}$. The answer A is a trap.", "B"),
    ("\\boxed{A} no, \\boxed{B}", "B"),
    ("答案：B", "B"),
    ("答案是B。", "B"),
    ("所以选B", "B"),
    ("Die Antwort ist B.", "B"),
    ("La réponse est (B)", "B"),
    ("First (A) seems right, but no: (B)", "B"),
    ("The answer is (A). No, wait: the answer is (B).", "B"),
    ("A) red\nB) blue\nC) green\nThe answer is B", "B"),
    ("A) red\nB) blue\nC) green", None),
    ("The answer is A or B.", None),
    ("A and B", None),
    ("Both (A) and (B)", None),
    ("\\boxed{A, B}", None),
    ("\\boxed{AB}", None),
    ("I think A is a letter and so am I", None),
    ("The answer is a fruit", None),
    ("The answer is Berlin", None),
    ("A fruit", None),
    ("a", "A"),
    ("The answer is not A.", None),
    ("E", None),
    ("", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "letter"), READ)
def test_choice_is_read_as_documented(text: str, letter: str | None) -> None:
    assert extract_choice(text) == letter


def test_the_page_says_what_is_read_as_which_letter() -> None:
    require_in_page("choices", table(("response", "its letter"), READ))


def test_i_is_a_letter_only_where_it_is_no_word() -> None:
    letters = "ABCDEFGHI"
    assert extract_choice("The answer is (I).", letters) == "I"
    assert extract_choice("My answer: I think so", letters) is None
    assert extract_choice("The answer is I.", letters) == "I"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Blue", 1),
        ("The answer is blue.", 1),
        ("\\boxed{\\text{Blue}}", 1),
        ("(B)", 1),
        ("The sky.\nIt is\n**blue**", 1),
        ("red", 0),
        ("The answer is red.", 0),
        ("blue or red", 0),
        ("not blue", 0),
    ],
)
def test_the_text_of_a_choice_stands_for_its_letter_where_a_column_has_the_texts(
    text: str, right: int
) -> None:
    signal = get_signal("multiple_choice").fn(choices="options")
    for gold in ("B", 1, 1.0, "Blue"):
        assert scores(signal, text, answer=gold, options=["Red", "Blue", "Green"]) == [right]
    assert scores(get_signal("multiple_choice").fn(), "Blue", answer="B") == [0.0]


def test_choices_that_are_no_list_name_the_row() -> None:
    signal = get_signal("multiple_choice").fn(choices="options")
    with pytest.raises(DataError, match=r"row-7.*'options' must be a list of 2 to 26"):
        scores(signal, "B", answer="B", options="Red")


@pytest.mark.parametrize("gold", ["F", "", "A or B", True, -1, 4, 0.5])
def test_multiple_choice_gold_that_is_no_choice_is_nan(gold: object) -> None:
    assert all(map(math.isnan, scores(get_signal("multiple_choice").fn(), "(B)", answer=gold)))


@pytest.mark.parametrize(
    "text",
    [
        "(" * 50_000,
        "answer is " * 20_000,
        "A or " * 20_000,
        "B\n" * 20_000,
        "\\boxed{" * 20_000,
        " " * 100_000 + "B",
    ],
)
def test_no_text_takes_long_to_read(text: str) -> None:
    start = time.perf_counter()
    extract_choice(text)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("gold", ["B", "b", "(B)", "\\boxed{B}", "**B**", "\uff22", 1, 1.0])
def test_multiple_choice_takes_letters_and_indices(gold: object) -> None:
    assert scores(get_signal("multiple_choice").fn(), "(B)", "(A)", "?", answer=gold) == [1, 0, 0]


EXACT: list[tuple[object, dict[str, object], str, int]] = [
    ("a b", {}, " a  b\n", 1),
    ("a b", {}, "ab", 0),
    ("a b", {}, "A b", 0),
    ("a b", {}, "a b.", 0),
    ("a b", {"ignore_case": True}, "A B", 1),
    (["yes", "yeah"], {}, "yeah", 1),
    (["yes", "yeah"], {}, "yes yeah", 0),
    (2, {}, "2", 1),
    (2, {"extract": r"\d+"}, "1, no: 2", 1),
    (2, {"extract": r"= (\d+)"}, "1 + 1 = 2", 1),
    (2, {"extract": r"= (\d+)"}, "2", 0),
    ("2", {"extract": r"<answer>(.*?)</answer>"}, "<answer>2</answer> <answer>1</answer>", 0),
]
FOUND: list[tuple[str, str, int]] = [
    (r"^ok\b", "ok then", 1),
    (r"^ok\b", "not ok", 0),
    (r"^ok\b", "okay", 0),
    (r"^ok\b", "no\nok", 0),
    (r"(?m)^ok\b", "no\nok", 1),
    (r"(?i)OK$", "It is ok", 1),
    (r"a.b", "a\nb", 0),
    (r"(?s)a.b", "a\nb", 1),
]


@pytest.mark.parametrize(("gold", "options", "text", "score"), EXACT)
def test_exact_match_is_of_the_whole_text_or_of_the_last_extract(
    gold: object, options: dict[str, object], text: str, score: int
) -> None:
    assert scores(get_signal("exact_match").fn(**options), text, answer=gold) == [score]


@pytest.mark.parametrize(("pattern", "text", "score"), FOUND)
def test_regex_searches_the_whole_response(pattern: str, text: str, score: int) -> None:
    assert scores(get_signal("regex").fn(pattern=pattern), text) == [score]


def test_the_page_says_what_equals_and_what_is_found() -> None:
    said = [
        (gold, ", ".join(f"{k}: {v}" for k, v in keys.items()) or None, text, score)
        for gold, keys, text, score in EXACT
    ]
    require_in_page("exact", table(("gold answer", "keys", "response", "score"), said))
    require_in_page("regex", table(("pattern", "response", "score"), FOUND))


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
