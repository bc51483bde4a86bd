"""Words of a text in any language, to compare texts by: runs of them, whose length is counted in words.

Where a script writes no spaces between words (Chinese, Japanese, Thai, …) each character is a unit of its own, and
so is each symbol: emoji, arrows, the operators of a sum. Two of either count as one word, about what two Chinese
characters say. Korean and Tibetan have marks between words or syllables, which count as words.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

import regex

_SPACELESS = (
    r"\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\u30FC\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}"
    r"\p{Script=Myanmar}\p{Script=Tai_Tham}\p{Script=Tai_Le}\p{Script=Javanese}\p{Script=Balinese}\p{Script=Yi}"
)
# No `$`: it is LaTeX's, and a copy of a problem may have \( instead. Marks belong to the letter before.
_SYMBOL = r"[[\p{Sm}\p{Sc}\p{So}]--[$|~]]"
_OPERATOR = r"(?<=\p{N}\s?)[-*/%](?=\s?\p{N})"
_UNIT = regex.compile(
    rf"(?V1)[[{_SPACELESS}]&&\p{{L}}]\p{{M}}*+|[[\p{{L}}\p{{M}}\p{{N}}_]--[[{_SPACELESS}]&&\p{{L}}]]++|{_SYMBOL}|{_OPERATOR}"
)
_WHOLE = regex.compile(rf"(?V1)[[\p{{L}}\p{{M}}\p{{N}}_]--[[{_SPACELESS}]&&\p{{L}}]]")
_ASCII_UNIT = re.compile(r"\w+|[+<=>]|(?:(?<=\d)|(?<=\d\s))[-*/%](?=\s?\d)")
"""The same of text that is ASCII, in an eighth of the time."""
# What is not seen: joiners, marks of direction, soft hyphens, byte-order marks, the choice of an emoji's style.
_UNSEEN = regex.compile(r"[\p{Cf}\uFE00-\uFE0F]+")


def words(text: str) -> list[str]:
    """The units of a text, in lower case; punctuation and white space do not count.

    Composed and decomposed letters are the same, and so are forms of a letter that NFKC makes one: full-width,
    mathematical, circled, ligatures, Arabic's by position. Superscripts and fractions stay, for x² is not x2.
    A text without a letter or digit (emoji, punctuation) is one unit, as it is written: it is like no other text.
    """
    pattern, written = _ASCII_UNIT, text
    if not text.isascii():
        text = unicodedata.normalize("NFC", _UNSEEN.sub("", text).translate(_forms()))
        pattern = _UNIT
    found = pattern.findall(text.casefold())
    if any(character.isalnum() for unit in found for character in unit):
        return found
    return ["".join(written.split())] if written.strip() else []


def num_words(units: Sequence[str]) -> float:
    """How many words the units are."""
    return sum(map(_halves, units)) / 2


def ngrams(units: Sequence[str], size: int) -> list[str]:
    """The runs of ``size`` words, as strings, one from each unit on; the whole text where it has no more words."""
    halves = [_halves(unit) for unit in units]
    found, end, total = [], 0, 0
    for start in range(len(units)):
        while total < 2 * size and end < len(units):
            total += halves[end]
            end += 1
        if total < 2 * size:
            break
        found.append(" ".join(units[start:end]))
        total -= halves[start]
    return found or [" ".join(units)]


@functools.lru_cache(maxsize=1 << 16)
def _halves(unit: str) -> int:
    return 2 if _WHOLE.match(unit) else 1


@functools.cache
def _forms() -> dict[int, str]:
    """Characters that are a form of others, as those."""
    ranges = (range(0xA0, 0x10000), range(0x1D400, 0x1D800), range(0x1EE00, 0x1F300))
    found = {code: unicodedata.decomposition(chr(code)) for each in ranges for code in each}
    return {
        code: unicodedata.normalize("NFKC", chr(code))
        for code, form in found.items()
        if form.startswith("<") and not form.startswith(("<super>", "<sub>", "<fraction>"))
    }
