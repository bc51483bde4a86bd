r"""What a number is, and which one a solution ends with: the one place where plain numbers are read.

One number are ``70000``, ``70,000``, ``70 000`` (any space, ``\,``, ``{,}``, ``'``), ``7e4``, ``7 \times 10^4``,
with any minus sign, digits of any script, a currency or unit beside it. A fraction is read by its value where a
decimal has it. ``3,5`` is 3.5. ``1,234`` and ``1.234`` are read as English writes them, unless the gold answer
is plainly written with a decimal comma (``3,5``, ``1.234,56``). A list, a range of digits that is no number
(``1,2,3``), a numeral with a base, a multiple of π or a root is none.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from prefopt.signals.plain_text import plain, without_wrappers

_MOST_DIGITS = 4000
"""Of a numeral or a power that is worked out: beyond it, and Python's own limit, there is no answer to check."""
_SIGN = r"(?:(?<![\w)\]}.])[-+])?"
_CURRENCY = r"(?:[$€£¥₹₩₽]|USD|EUR|GBP)?[ ]?"
_TEN = r"[ ]*(?:×|·|⋅|\*|[xX]|\\times|\\cdot)[ ]*10(?:\^|\*\*)\{?[ ]?(?P<ten>[-+]?\d+)[ ]?\}?"
_NUMBER = re.compile(
    rf"""(?P<sign>{_SIGN}){_CURRENCY}(?P<inner_sign>{_SIGN})
    (?P<numeral>
        (?<![\d.,])[1-9]\d{{0,2}}(?:[ ]\d{{3}})+(?![\d])(?:[.,]\d+)?
      | (?<![\d.,])[1-9]\d{{0,2}}(?:['’]\d{{3}})+(?![\d])(?:[.,]\d+)?
      | (?<![\d.,])[1-9]\d{{0,2}}(?:_\d{{3}})+(?![\d])(?:\.\d+)?
      | \d+(?:[.,]\d+)*
      | (?<!\d)\.\d+
    )
    (?: {_TEN}
      | [eE](?P<e>[-+]?\d+)(?![\w.])
      | (?:\^|\*\*)(?P<power>\{{[^{{}}]*(?:\}}|\{{[^{{}}]*\}}+)|[-+]?\d+)
      | [ ](?P<upper>\d+)[ ]?/[ ]?(?P<lower>\d+)(?![\d/.])
      | [ ]?/[ ]?(?P<under>\d+(?:\.\d+)?)(?![\d.]*/)
      | (?P<dates>[ ]?/[ ]?\d+/[\d/]*)
    )?
    (?P<base>_\{{?\d+\}}?|(?<=\d)_\{{[^}}]*\}}?)?""",
    re.VERBOSE,
)
_MARKER = re.compile(
    r"\\(?:boxed|fbox)\s*\{|####|\bA:"
    r"|(?i:\banswer[*_ ]*(?:\s+is|\s*=))[*_ ]*:?|(?i:\banswer[*_ ]*:)|(?:答案|答え)[*_ ]*(?:是|为|為|は|：|:)"
)
_HEADING = re.compile(r"[ *_]*(?:[^\W\d_][^\n]*|\d+[.):][ *_]+[^\W\d_][^\n]*)")
_NO_VALUE_BEFORE = re.compile(r"(?:√|\\sqrt(?:\[\w+\])?\{?|\^\{?|_\{?|±|\\pm|\\mp|∓)[ ]?$")
_NO_VALUE_AFTER = re.compile(r"[ ]?(?:π|\\pi|√|\\sqrt|!(?!\w)(?=[ ]?[=\d]))")
_CHAIN = re.compile(r"(?:[ \d.,+\-*/×·÷x^()${}%€£]|\\times|\\cdot|\\div)*=[ ]*")
_BEFORE_VALUE = re.compile(r"^.*[=≈:]|^(?:\\approx|≈|~)")
_UNIT = re.compile(
    r"[ ]*[%°$€£¥]*[ ]*(?:(?![xyznπ](?![^\W\d_])|(?:and|or|und|oder|to|by|±)\b)[^\W\d_].*|/[^\W\d_].*)?[.! ]*",
    re.DOTALL,
)
_WORD = re.compile(r"(?<!\\)\b[^\W\d_]{2,}")
_FEW_WORDS = 3


@dataclass(frozen=True)
class Number:
    """A numeral in a text."""

    value: Decimal | None
    """None for one that has no value here: a list, a fraction without a finite decimal, a multiple of π."""
    decimal_comma: bool
    """It cannot be written so but with a decimal comma, or dots between thousands."""
    is_decimal: bool
    """It is written as a decimal, and not as a fraction or mixed number."""


def extract_number(text: str, *, decimal_comma: bool = False) -> Decimal | None:
    r"""The final number of a solution; None where there is none, or what stands there is no number.

    It is the first number after the last marker (``####``, ``A:``, ``\boxed{``, ``answer is``, ``answer:``), or of
    the equality that begins there (``3 + 4 = 7``) its last, and without a marker the last of the text. What a box
    holds is the answer, number or not.

    Args:
        text: a response without its thinking.
        decimal_comma: read ``1,234`` as 1.234 and ``1.234`` as 1234, as a gold answer of that form asks.
    """
    found = _final(plain(text), decimal_comma)
    return None if found is None else found.value


def gold_number(text: str) -> Number | None:
    """The number that a gold answer is, or that a gold solution ends with; None where it is no decimal number.

    A fraction, an expression or a list is not the number that happens to stand in it.
    """
    text = plain(text)
    place = _last_marker(text)
    if place is None and len(_WORD.findall(text)) < _FEW_WORDS:
        found = _whole(text, decimal_comma=False)
    else:
        found = _final(text, decimal_comma=False)
    return found if found is not None and found.is_decimal and found.value is not None else None


def is_right_number(text: str, gold: Number) -> bool:
    """Is the final number of ``text`` the gold one, read as that is written?"""
    return extract_number(text, decimal_comma=gold.decimal_comma) == gold.value


def whole_number(text: str) -> Decimal | None:
    """The value of a text that is one number and at most a unit; None for any other."""
    found = _whole(plain(text), decimal_comma=False)
    return None if found is None else found.value


def _final(text: str, decimal_comma: bool) -> Number | None:
    marker = _last_marker(text)
    if marker is not None and marker.group().endswith("{"):
        return _whole(_braced(text, marker.end()), decimal_comma)
    if marker is not None and (first := _NUMBER.search(text, marker.end())):
        return _number(_end_of_chain(text, first), text, decimal_comma)
    all_of_them = deque(_NUMBER.finditer(text), maxlen=1)
    return _number(all_of_them[0], text, decimal_comma) if all_of_them else None


def _last_marker(text: str) -> re.Match[str] | None:
    """The last marker; one of a heading (``#### Step 3``) is none."""
    found = None
    for each in _MARKER.finditer(text):
        if each.group() != "####" or not _HEADING.match(text, each.end()):
            found = each
    return found


def _end_of_chain(text: str, first: re.Match[str]) -> re.Match[str]:
    """The last number of the equality that begins with ``first``."""
    last = first
    while chain := _CHAIN.match(text, last.start()):
        following = _NUMBER.match(text, chain.end())
        if following is None:
            break
        last = following
    return last


def _braced(text: str, start: int) -> str:
    """From ``start`` to the brace that closes what was opened before it, or to the end."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return text[start:]


def _whole(text: str, decimal_comma: bool) -> Number | None:
    """The number that ``text`` is, perhaps after ``x =`` and before a unit; None where it is more than that."""
    text = _BEFORE_VALUE.sub("", without_wrappers(text).strip()).strip(" \n$")
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    found = _NUMBER.match(text)
    if found is None or not _UNIT.fullmatch(text, found.end()):
        return None
    return _number(found, text, decimal_comma)


def _number(match: re.Match[str], text: str, decimal_comma: bool) -> Number:
    none = Number(None, decimal_comma=False, is_decimal=False)
    if (
        len(match.group()) > _MOST_DIGITS
        or match["base"]
        or match["dates"]
        or _NO_VALUE_BEFORE.search(text[max(0, match.start() - 12) : match.start()])
        or _NO_VALUE_AFTER.match(text, match.end())
    ):
        return none
    numeral = re.sub(r"[ '’_]", "", match["numeral"])
    digits = _digits(numeral, decimal_comma)
    if digits is None:
        return none
    is_decimal = not (match["under"] or match["lower"])
    value = _worked_out(digits, match)
    negative = "-" in (match["sign"] or "") + (match["inner_sign"] or "")
    # The sign is written and not computed: arithmetic on decimals rounds to 28 digits.
    signed = None if value is None else Decimal(f"-{value}" if negative else f"{value}")
    return Number(signed, _is_with_comma(numeral), is_decimal)


def _worked_out(digits: str, match: re.Match[str]) -> Decimal | None:
    """``digits`` with the power of ten, power or fraction behind them."""
    exponent = match["ten"] or match["e"]
    if exponent is not None:
        return Decimal(f"{digits}e{exponent}") if len(exponent) < 7 else None
    if match["power"] is not None:
        return _power(digits, match["power"].strip("{} "))
    if match["lower"]:
        whole = Fraction(digits)
        return _as_decimal(int(match["upper"]) + whole * int(match["lower"]), match["lower"])
    if match["under"]:
        return _as_decimal(Fraction(digits), match["under"])
    return Decimal(digits)


def _power(digits: str, exponent: str) -> Decimal | None:
    if not re.fullmatch(r"[-+]?\d{1,6}", exponent):
        return None  # a tower, or no integer
    count = int(exponent)
    if digits == "10":
        return Decimal(f"1e{count}")
    if not digits.isdigit() or count < 0 or len(digits) * count > _MOST_DIGITS:
        return None
    return Decimal(int(digits) ** count)


def _as_decimal(upper: Fraction, lower: str) -> Decimal | None:
    """A quotient that has a finite decimal, exactly; None for any other."""
    divisor = Fraction(lower)
    if not divisor or len(lower) > 20:
        return None
    value = upper / divisor
    rest, places = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        places = max(places, count)
    if rest != 1:
        return None
    return Decimal(f"{value.numerator * 10**places // value.denominator}e-{places}")


def _digits(numeral: str, decimal_comma: bool) -> str | None:
    """``numeral`` with a decimal point and without marks between thousands; None where it is no number."""
    whole, point = numeral, ""
    marks = [each for each in numeral if each in ".,"]
    if len(set(marks)) == 2:
        if marks.count(marks[-1]) > 1:
            return None
        point = marks[-1]
    elif len(marks) == 1 and not (
        _is_grouped(numeral, marks[0]) and (marks[0] == ",") != decimal_comma
    ):
        point = marks[0]
    decimals = ""
    if point:
        whole, decimals = numeral.split(point)
    groups = re.sub(r"\d", "", whole)
    if groups and not _is_grouped(whole, groups[0]):
        return None
    whole = re.sub(r"[.,]", "", whole) or "0"
    return f"{whole}.{decimals}" if decimals else whole


def _is_grouped(whole: str, mark: str) -> bool:
    """Are these thousands, ``1,234,567`` (with commas also ``12,34,567``)?"""
    mark, between = re.escape(mark), "{2,3}" if mark == "," else "{3}"
    return bool(re.fullmatch(rf"[1-9]\d{{0,2}}(?:{mark}\d{between})*{mark}\d{{3}}", whole))


def _is_with_comma(numeral: str) -> bool:
    marks = [each for each in numeral if each in ".,"]
    if len(set(marks)) == 2:
        return marks[-1] == ","
    if marks == [","]:
        return not _is_grouped(numeral, ",")
    return len(marks) > 1 and marks[0] == "." and _is_grouped(numeral, ".")
