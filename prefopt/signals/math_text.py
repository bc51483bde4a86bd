r"""Mathematical answers rewritten for math-verify where it would read something else: ``10\,000`` as 10 · 000.

Source: tried against math-verify 0.9.0; each rule has its rows in tests/signals/test_math.py.
"""

from __future__ import annotations

import re
from decimal import Decimal

from prefopt.signals.plain_text import spelled, tagged_answer

_SPACED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?!\d| \d)")
_COMMA_DECIMAL = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:\.\d{3})+),(\d+)(?![\d.,])")
_BRACED_COMMA = re.compile(r"(\d)\{,\}(?=(\d+))")
_CURRENCY = re.compile(r"(?:[€£¥₹]|\\(?:euro|pounds)(?![a-zA-Z])) ?(?=[-+]?[\d.])")
_POWER_OF_TEN = re.compile(
    r"(?<![\w.\\])(\d+(?:\.\d+)?)"
    r"(?:[eE]([-+]?\d{1,3})(?![\w.])| ?[×xX·] ?10\^(?:\{([-+]?\d{1,3})\}|([-+]?\d{1,3})))"
)
_ROOT = re.compile(r"√ ?(?:\(([^()]{1,60})\)|\{([^{}]{1,60})\}|(\d+(?:\.\d+)?|[a-zA-Z]))")
_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*)(?:\\(?:overline|bar)\s*\{?(\d+)\}?|\\dot\s*\{?(\d)\}?)(?!\d|\\dot)"
)
_BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
}
_BASES |= {"twelve": 12, "sixteen": 16}
_NUMERAL = r"\d[0-9A-Z]*|[0-9A-F]{2,}"
_NAMED_BASE = re.compile(
    rf"_(?:\{{\s*)?\\(?:text|mathrm)\{{\s*({'|'.join(_BASES)}|\d{{1,2}})\s*\}}(?:\s*\}})?"
)
_BASE = re.compile(
    rf"(?<![\w.\\])(?:\(({_NUMERAL})\)|\\text\{{({_NUMERAL})\}}|({_NUMERAL}))_(?:(\d)|\{{(\d{{1,2}})\}})(?!\w)"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DELIMITED = re.compile(r"\$|\\[(\[]|\\boxed|\\begin")
_JOINT = re.compile(
    r"[\s$.;\\()\[\]]*(?:,|\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\})[\s$\\()\[\]]*(?:[a-zA-Z]\w*\s*=\s*)?"
)
_LONGEST, _MOST_DIGITS = 60, 1000


def rewritten(text: str) -> str:
    """``text`` with its numbers in a spelling that math-verify knows."""
    said = tagged_answer(text)
    if said is not None and "\\" in said and not _DELIMITED.search(said):
        text = rf"\boxed{{{said.strip()}}}"  # math-verify reads LaTeX between its delimiters only
    text = _from_last_answer(text)
    # Before the general spelling, which has no braces around a comma: {,} is a decimal comma, or one of thousands.
    text = _BRACED_COMMA.sub(lambda m: m[1] + ("," if len(m[2]) == 3 else "."), text)
    text = spelled(text)
    text = _SPACED.sub(lambda m: m.group().replace(" ", ""), text)
    text = _COMMA_DECIMAL.sub(lambda m: m[1].replace(".", "") + "." + m[2], text)
    text = _CURRENCY.sub("", text)
    text = _NAMED_BASE.sub(lambda m: f"_{{{_BASES.get(m[1], m[1])}}}", text)
    text = _POWER_OF_TEN.sub(_multiplied, text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3]}}}", text)
    return _REPEATING.sub(_fraction, text)


def _from_last_answer(text: str) -> str:
    """``text`` from the last box on, or the boxes that a comma, "and" or "or" joins to it: others are guesses.

    math-verify takes several boxes in a text for the elements of one answer.
    """
    boxes = [(each.start(), _closing(text, each.end())) for each in _BOX.finditer(text)]
    first = len(boxes) - 1
    while first > 0 and _JOINT.fullmatch(text, boxes[first - 1][1], boxes[first][0]):
        first -= 1
    if first <= 0:
        return text
    start = boxes[first][0]
    opened = text.rfind("\n", 0, start) + 1
    dollars = len(re.findall(r"(?<!\\)\$", text[opened:start]))
    return "$" * (dollars % 2) + text[start:]


def _closing(text: str, start: int) -> int:
    """Behind the brace that closes what was opened before ``start``; the end of the text where none does."""
    depth = 1
    for match in re.compile(r"\\[{}]|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.end()
    return len(text)


def with_values(text: str) -> str:
    """``text`` with every numeral that names its base (``1010_2``) as the decimal number that it is."""
    return _BASE.sub(lambda m: m.group() if (value := _value(m)) is None else str(value), text)


def without_bases(text: str) -> str:
    """``text`` with the digits alone of every numeral that names its base."""
    return _BASE.sub(lambda m: m.group() if _value(m) is None else _parts(m)[0], text)


def _value(match: re.Match[str]) -> int | None:
    digits, base = _parts(match)
    if len(digits) > _MOST_DIGITS:
        return None
    try:
        return int(digits, int(base))
    except ValueError:  # a digit that this base does not have, or no base: an index
        return None


def _parts(match: re.Match[str]) -> list[str]:
    """The digits and the base."""
    return [each for each in match.groups() if each]


def _multiplied(match: re.Match[str]) -> str:
    value = f"{Decimal(match[1] + 'e' + (match[2] or match[3] or match[4])):f}"
    return value if len(value) <= _LONGEST else match.group()


def _fraction(match: re.Match[str]) -> str:
    r"""``0.1\overline{6}`` as ``\frac{15}{90}``."""
    period = match[3] or match[4]
    whole, once = match[1] or "0", match[2]
    if len(whole + once + period) > _LONGEST:
        return match.group()
    upper = int(whole + once + period) - int(whole + once)
    return rf"\frac{{{upper}}}{{{'9' * len(period)}{'0' * len(once)}}}"
