"""What a number is, however it is written, and which one of a text is the answer."""

from __future__ import annotations

import math
import time
from decimal import Decimal

import pytest

from prefopt.recipe.registry import get_signal
from prefopt.signals.numbers import extract_number, gold_number
from tests.signals.cases import scores
from tests.signals.readings import require_in_page, table

READ = [
    ("<answer>42</answer> as 6 * 7 = 42 and 42 - 2 = 40", "42"),
    ("The total is <b>42</b>", "42"),
    ("It is \u22125.", "-5"),
    ("It is \uff0d5 or \u20115", "-5"),
    ("x = \u2212 5", "-5"),
    ("10-5", "5"),
    ("pages 3\u20135", "5"),
    ("$-5", "-5"),
    ("-$5", "-5"),
    ("\\boxed{(-5)}", "-5"),
    ("#### 70,000", "70000"),
    ("#### 70\u2009000", "70000"),
    ("#### 70\u202f000\u00a0", "70000"),
    ("#### 70 000", "70000"),
    ("#### 1 234 567,5", "1234567.5"),
    ("10\\,000 or $10{,}000$", "10000"),
    ("10,\\!000", "10000"),
    ("1'234'567", "1234567"),
    ("1_000", "1000"),
    ("12,34,567", "1234567"),
    ("3,5", "3.5"),
    ("0,125", "0.125"),
    ("1,234", "1234"),
    ("1.234", "1.234"),
    ("1.234,56", "1234.56"),
    ("1,234.56", "1234.56"),
    ("1.234.567", "1234567"),
    ("1,2,3", None),
    ("1.2.3", None),
    ("\uff14\uff12", "42"),
    ("\u0664\u0662", "42"),
    ("\u0661\u066b\u0665", "1.5"),
    ("1.2e3", "1200"),
    ("1.2 × 10^3", "1200"),
    ("1.2\\times 10^{-3}", "0.0012"),
    ("6 x 10\u2074", "60000"),
    ("10^{-20}", "1e-20"),
    ("2^{10}", "1024"),
    ("9^{9^{9}}", None),
    ("2^{-1}", None),
    ("25%", "25"),
    ("$1,250.50 in total", "1250.50"),
    ("5 \u20ac", "5"),
    ("\u20ac5", "5"),
    ("USD 5", "5"),
    ("5 USD.", "5"),
    ("90^\\circ", "90"),
    ("about .5", "0.5"),
    ("The answer is 1/2", "0.5"),
    ("\\boxed{\\frac{3}{4}}", "0.75"),
    ("1\\frac{1}{2}", "1.5"),
    ("1 1/2 cups", "1.5"),
    ("2\u00bd", "2.5"),
    ("1/3", None),
    ("12/25/2020", None),
    ("60 miles/hour", "60"),
    ("\\boxed{2\\pi}", None),
    ("\\boxed{\\sqrt{5}}", None),
    ("\u00b15", None),
    ("1010_2", None),
    ("1010\u2082", None),
    ("\\boxed{42}", "42"),
    ("\\boxed{\\text{42 eggs}}", "42"),
    ("\\boxed{x = 5}", "5"),
    ("\\boxed{3 + 4 = 7}", "7"),
    ("\\boxed{3, 5}", None),
    ("\\boxed{5x}", None),
    ("\\boxed{41} wait, \\boxed{42}", "42"),
    ("\\boxed{41}. So the answer is 42.", "42"),
    ("\\boxed{\\mathrm{none}} of 3", None),
    ("Answer: **42**", "42"),
    ("**Answer:** 42", "42"),
    ("**Answer**: 42. That is 6 * 7.", "42"),
    ("The answer is 5. (Not 6.)", "5"),
    ("The answer is 3 + 4 = 7.", "7"),
    ("The answer is 3. No: the answer is 4.", "4"),
    ("答案是 42", "42"),
    ("#### 1. Add them\nThat makes 42", "42"),
    ("first 12, then 13", "13"),
    ("none", None),
    ("", None),
]  # fmt: skip
GOLDS = [
    ("70000", "70000"),
    ("3 + 4 = 7\n#### 7", "7"),
    ("18 apples", "18"),
    ("\\$18.90", "18.90"),
    ("$42$", "42"),
    ("x = 5", "5"),
    ("He has 3 and buys 4, so 7", "7"),
    ("3,5", "3.5"),
    ("1/2", None),
    ("\\frac{1}{2}", None),
    ("\\frac{\\pi}{2}", None),
    ("3\\sqrt{2}", None),
    ("x^2 + 1", None),
    ("(3, 5)", None),
    ("1010_2", None),
    ("\\text{four}", None),
    ("B", None),
]


@pytest.mark.parametrize(("text", "number"), READ)
def test_a_number_is_read_however_it_is_written(text: str, number: str | None) -> None:
    assert extract_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(("text", "number"), GOLDS)
def test_a_gold_answer_is_a_decimal_number_or_none(text: str, number: str | None) -> None:
    found = gold_number(text)
    assert (found and found.value) == (None if number is None else Decimal(number))
    assert math.isnan(scores(get_signal("final_number").fn(), "7", answer=text)[0]) == (
        found is None
    )


def test_the_page_says_what_is_read_as_which_number() -> None:
    require_in_page("numbers", table(("response", "its number"), READ))
    require_in_page("gold numbers", table(("gold answer", "its number"), GOLDS))


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("3.5", ["3.5", "3,5", "7/2"], ["35", "3", "5"]),
        ("3,5", ["3.5", "3,5"], ["35"]),
        ("35", ["35"], ["3,5", "3.5"]),
        ("1,234", ["1234", "1,234", "1 234"], ["1.234"]),
        ("1.234,56", ["1234.56", "1.234,56", "1234,56"], ["1.23456"]),
        ("1234567,5", ["1.234.567,5"], []),
        ("2", ["2", "2.0", "$2"], ["1/2", "-2", "x_2"]),
        ("-5", ["\u22125"], ["5"]),
        ("5", ["5"], ["\u22125"]),
    ],
)
def test_final_numbers_are_compared_as_the_gold_answer_is_written(
    gold: str, right: list[str], wrong: list[str]
) -> None:
    found = scores(get_signal("final_number").fn(), *right, *wrong, answer=gold)
    assert found == [1.0] * len(right) + [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("gold", "text"), [("0,500", "0.5"), ("1,500,0", None), ("1.500,0", "1500")]
)
def test_a_decimal_comma_is_told_by_what_else_it_could_be(gold: str, text: str | None) -> None:
    found = gold_number(gold)
    assert (found and found.value) == (None if text is None else Decimal(text))


def test_a_gold_answer_with_a_decimal_comma_has_its_thousands_read_so_too() -> None:
    assert extract_number("1.234", decimal_comma=True) == 1234
    assert extract_number("1,234", decimal_comma=True) == Decimal("1.234")


@pytest.mark.parametrize(
    "text",
    [
        "9" * 100_000,
        "1," * 100_000,
        "1 " * 100_000,
        "1" + " 000" * 50_000,
        "\\boxed{" * 20_000 + "1",
        "answer is " * 20_000,
        "(" * 50_000 + "1",
        "1=" * 50_000,
        "1/2" * 50_000,
        "9e999999",
        "9e-99999999999",
        "9^999999",
        "1/" + "3" * 50_000,
        "-" * 100_000 + "1",
        "1^{" * 20_000,
    ],
)
def test_no_numeral_takes_long(text: str) -> None:
    start = time.perf_counter()
    extract_number(text)
    gold_number(text)
    assert time.perf_counter() - start < 2
