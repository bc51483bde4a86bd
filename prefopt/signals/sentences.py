"""Sentences of a text: by fixed rules, or by nltk's trained model where its data is installed.

IFEval's published checker uses the model (Punkt), whose data has to be downloaded. The rules need nothing, give
the same on every machine, and differ from it in two ways that matter there: a list's number counts (``1.``) even
in text without capitals, and so does a full stop that markup follows (``</p>``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from prefopt.errors import ConfigError

Splitter = Callable[[str], list[str]]
"""From a text to its sentences, in order."""

_END = re.compile(r"[.!?]+[\"'”’)\]]*")
"""A run of end marks, with the quotes and brackets that it closes."""
_TITLES = frozenset(
    ["mr", "mrs", "ms", "dr", "prof", "st", "capt", "lt", "mt", "rev", "gen", "col", "sgt", "hon"]
)
_TAGS = frozenset(["fig", "vol", "jr", "sr", "inc", "ltd", "co"])
"""End no sentence, like titles: a name or number goes with them."""
_SHORT = frozenset(["etc", "vs", "ph.d", "a.m", "p.m", "p.s"])
"""End one unless a small letter follows."""
_INITIALS = re.compile(r"[a-hj-z]|[a-z]\.[a-z]")
"""``J``, ``U.S``, ``e.g``; not ``I``, which is a pronoun or a numeral."""
_LAST_WORD = re.compile(r"[^\s(\[\"“*_]+$")
_LONGEST = 8
"""Characters before a full stop that are looked at: every abbreviation fits."""


def split_sentences(text: str) -> list[str]:
    """Sentences by rule: they end with ``.``, ``!`` or ``?`` (a run of them is one end), or with the text.

    No end: a full stop before a letter or digit (``3.5``, ``example.com``), after initials or a title
    (``J. Doe``, ``U.S.``, ``Dr.``), or after another abbreviation before a small letter. What follows the last
    end is a sentence, too. Linear in the text.
    """
    sentences: list[str] = []
    start = 0
    for end in _END.finditer(text):
        if not _inside(text, end):
            sentences.append(text[start : end.end()].strip())
            start = end.end()
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


def _inside(text: str, end: re.Match[str]) -> bool:
    """Is this a full stop that ends no sentence?"""
    if end.group() != ".":
        return False
    if text[end.end() : end.end() + 1].isalnum():
        return True
    found = _LAST_WORD.search(text, max(0, end.start() - _LONGEST), end.start())
    word = found.group().lower() if found else ""
    if word in _SHORT:
        return text[end.end() : end.end() + _LONGEST].lstrip()[:1].islower()
    return word in _TITLES or word in _TAGS or bool(_INITIALS.fullmatch(word))


@functools.cache
def punkt_splitter() -> Splitter:
    """nltk's English Punkt model: what IFEval's published checker counts with.

    Raises: ConfigError if nltk, or the model's data (``punkt_tab``), is not installed. Nothing is downloaded.
    """
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError as error:
        raise ConfigError(
            'sentences = punkt needs nltk: pip install "nltk>=3.9", or leave the setting out: rules'
        ) from error
    try:
        tokenizer = PunktTokenizer("english")
    except LookupError as error:
        raise ConfigError(
            "sentences = punkt needs the data of nltk's model, which is not on this machine: "
            "python -m nltk.downloader punkt_tab (or set NLTK_DATA), or leave the setting out: rules"
        ) from error
    return lambda text: list(tokenizer.tokenize(text))
