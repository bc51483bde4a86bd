"""One spelling for what is written in many: digits of every script, minus signs, spaces, LaTeX, Markdown.

Every verifier that reads an answer out of a text sees it through this first: none knows a sign that others do not.
"""

from __future__ import annotations

import re
import unicodedata

_MINUS = "\u2212\ufe63\uff0d\u2010\u2011\u2012\u2013"
_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t"
_NOTHING = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u2061\u2062\u2063\u2064"
_SIGNS = dict(zip("．，：％＄＋／＝（）［］＾＊٫٬⁄∕﹩٪", ".,:%$+/=()[]^*.,//$%", strict=True))
_TABLE = str.maketrans(
    {**dict.fromkeys(_MINUS, "-"), **dict.fromkeys(_SPACES, " "), **dict.fromkeys(_NOTHING, ""), **_SIGNS}
)  # fmt: skip
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUPERS, _SUBS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_OTHER_DIGIT = re.compile(r"[^\x00-\x7f]")
_SPACING = (
    (re.compile(r"\{([,.])\}"), r"\1"),
    (re.compile(r"\\(?:!|negthinspace(?![a-zA-Z]))"), ""),
    (
        re.compile(
            r"(?<!\\)\\[,;:> ]|\\(?:quad|qquad|thinspace|enspace|space)(?![a-zA-Z])|(?<!\\)~"
        ),
        " ",
    ),
)
_OF_NUMBERS = (
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])"), ""),
    (re.compile(r"\\([$%#])"), r"\1"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])"), "°"),
    (re.compile(r"\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r" \1/\2"),
    (re.compile(r"([=(:] *)- +(?=[.\d])"), r"\1-"),
)
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|texttt|textrm|textsf|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|mathbb|mbox|"
    r"operatorname\*?|emph|bold|boldsymbol|bm|underline|hbox)\s*\{([^{}]*)\}"
)
# Tags of answers (the form that R1 made common), and what HTML says of looks alone. No other: `a<b` is a relation.
_TAGGED = re.compile(
    r"<(?:final_?)?answer>(?P<x>(?:(?!<(?:final_?)?answer>).)*?)(?:</(?:final_?)?answer>|\Z)",
    re.IGNORECASE | re.DOTALL,
)
_LOOKS = re.compile(
    r"</?(?:b|strong|i|em|u|mark|span|font|p|div|center|code|kbd|sub|sup|big|small|br)(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
_SWITCH = re.compile(r"\\(?:bf|rm|it|sf|tt|bfseries|mathstrut)(?![a-zA-Z])\s*")


def spelled(text: str) -> str:
    """``text`` with ASCII digits, minus signs, spaces and separators; superscripts as ``^``, LaTeX's spacing as
    spaces; of ``<answer>…</answer>`` the last content, without tags of HTML that say how it looks."""
    text = _untagged(text)
    if _OTHER_DIGIT.search(text):
        text = _SUPERS.sub(lambda found: "^" + _braced(found.group().translate(_SUPER)), text)
        text = _SUBS.sub(lambda found: "_" + _braced(found.group().translate(_SUB)), text)
        text = text.translate(_TABLE)
        text = _OTHER_DIGIT.sub(lambda found: _ascii(found.group()), text)
    for pattern, spelling in _SPACING:
        text = pattern.sub(spelling, text)
    return text


def plain(text: str) -> str:
    """`spelled`, and without LaTeX's ways of writing a plain number: simple fractions, degrees, escaped signs."""
    text = spelled(text)
    for pattern, spelling in _OF_NUMBERS:
        text = pattern.sub(spelling, text)
    return text


def without_wrappers(text: str) -> str:
    r"""``text`` without what only says how it looks: ``\text{…}``, ``\mathbf{…}``, ``**…**``, backticks, ``$``."""
    previous = None
    while previous != text:
        previous, text = text, _WRAPPER.sub(r"\1", text)
    text = _SWITCH.sub("", text)
    text = re.sub(r"\\[()\[\]]", " ", text)
    return re.sub(r"\*\*|__|`", "", text)


def tagged_answer(text: str) -> str | None:
    """What stands in the last ``<answer>…</answer>`` that holds something; None without one."""
    said = [found["x"] for found in _TAGGED.finditer(text) if found["x"].strip()]
    return said[-1] if said else None


def _untagged(text: str) -> str:
    return text if "<" not in text else _LOOKS.sub("", tagged_answer(text) or text)


def _braced(digits: str) -> str:
    return digits if len(digits) == 1 else f"{{{digits}}}"


def _ascii(character: str) -> str:
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    return character
