"""One function for each instruction of IFEval: does a response follow it?

Names, arguments and verdicts are those of IFEval's published checker (arXiv:2311.07911), so its rows, and training
sets made in its image, work as they are. Where it leaves a verdict to chance there is one answer here: a letter
to be counted that is none (``#``, ``!``) is counted as it stands (theirs is replaced by a random letter), a
relation left out is ``at least`` (theirs is drawn), and the language detector is seeded. Words and markers are
literal text, theirs are patterns: the same for every row of IFEval.

A check gets the response and its arguments and returns a bool in time linear in the response.
`prefopt.signals.instructions` checks arguments, before any scoring.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from prefopt.signals.language import detect_language
from prefopt.signals.sentences import Splitter, split_sentences

Check = Callable[..., bool]
Relation = Literal["at least", "less than"]
Count = Annotated[int, Field(ge=0)]
Place = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Letter = Annotated[str, Field(min_length=1, max_length=1)]
Words = Annotated[list[Text], Field(min_length=1)]

CHECKS: dict[str, Check] = {}
"""By IFEval's instruction id."""
NEEDS_LANGUAGE: set[str] = set()
"""Ids of the checks that ask a language detector."""

_Check = TypeVar("_Check", bound=Check)


def check(name: str, *, language: bool = False) -> Callable[[_Check], _Check]:
    """Files a function under an instruction id."""

    def file(fn: _Check) -> _Check:
        CHECKS[name] = fn
        if language:
            NEEDS_LANGUAGE.add(name)
        return fn

    return file


def _compare(count: int, relation: Relation, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


# --- length ------------------------------------------------------------------------------------------


@check("length_constraints:number_words")
def number_words(text: str, num_words: Count, relation: Relation = "at least") -> bool:
    """Words are runs of letters, digits and underscores."""
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


@check("length_constraints:number_sentences")
def number_sentences(
    text: str,
    num_sentences: Count,
    relation: Relation = "at least",
    *,
    split: Splitter = split_sentences,
) -> bool:
    return _compare(len(split(text)), relation, num_sentences)


@check("length_constraints:number_paragraphs")
def number_paragraphs(text: str, num_paragraphs: Count) -> bool:
    """Paragraphs are separated by the markdown rule ``***``; an empty one inside fails."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = parts[1:-1]
    return all(part.strip() for part in inner) and _count_filled(parts) == num_paragraphs


@check("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(
    text: str, num_paragraphs: Count, nth_paragraph: Place, first_word: Text
) -> bool:
    """Paragraphs are separated by two line breaks; counted from 1, the n-th begins with the word."""
    parts = text.split("\n\n")
    if nth_paragraph > _count_filled(parts) or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    word = re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower()
    return _count_filled(parts) == num_paragraphs and word == first_word.lower()


# --- words -------------------------------------------------------------------------------------------


@check("keywords:existence")
def keywords(text: str, keywords: Words) -> bool:
    """Each is somewhere in the text, be it within another word."""
    return all(re.search(re.escape(word), text, flags=re.IGNORECASE) for word in keywords)


@check("keywords:frequency")
def keyword_frequency(
    text: str, keyword: Text, frequency: Count, relation: Relation = "at least"
) -> bool:
    count = len(re.findall(re.escape(keyword.strip()), text, flags=re.IGNORECASE))
    return _compare(count, relation, frequency)


@check("keywords:forbidden_words")
def forbidden_words(text: str, forbidden_words: Words) -> bool:
    """None is in the text as a whole word."""
    patterns = (rf"\b{re.escape(word)}\b" for word in forbidden_words)
    return not any(re.search(pattern, text, flags=re.IGNORECASE) for pattern in patterns)


@check("keywords:letter_frequency")
def letter_frequency(
    text: str, letter: Letter, let_frequency: Count, let_relation: Relation = "at least"
) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


# --- language, case and punctuation ------------------------------------------------------------------


@check("language:response_language", language=True)
def response_language(text: str, language: Text) -> bool:
    """An ISO 639-1 code; a text that shows no language follows."""
    return detect_language(text) in (language, None)


@check("change_case:english_capital", language=True)
def all_capital(text: str) -> bool:
    """English, or no language that could be told, without a lower-case letter."""
    return text.isupper() and detect_language(text) in ("en", None)


@check("change_case:english_lowercase", language=True)
def all_lowercase(text: str) -> bool:
    """English, or no language that could be told, without a capital."""
    return text.islower() and detect_language(text) in ("en", None)


# What separates tokens in the Penn Treebank's convention, as far as it changes how many are in capitals: white
# space, most punctuation (not hyphen, slash, asterisk, underscore or single full stop), and the places where
# contractions come apart (DO|N'T, IT|'S, CAN|NOT).
_TOKEN_BREAK = re.compile(
    r"[\s;@#$%&?!()\[\]{}<>\"“”‘’„«»`–—]|--|\.\.\.|[:,](?!\d)"
    r"|(?=n't\b)|(?<=\S)(?='(?:s|m|d|ll|re|ve)\b)"
    r"|(?<=\bcan)(?=not\b)|(?<=\bgon)(?=na\b)|(?<=\bwan)(?=na\b)|(?<=\bgot)(?=ta\b)"
    r"|(?<=\bgim)(?=me\b)|(?<=\blem)(?=me\b)",
    flags=re.IGNORECASE,
)


@check("change_case:capital_word_frequency")
def capital_word_frequency(
    text: str, capital_frequency: Count, capital_relation: Relation = "at least"
) -> bool:
    """Words are Treebank tokens; one in capitals has a letter and none in lower case."""
    count = sum(token.isupper() for token in _TOKEN_BREAK.split(text))
    return _compare(count, capital_relation, capital_frequency)


@check("punctuation:no_comma")
def no_comma(text: str) -> bool:
    return "," not in text


# --- format ------------------------------------------------------------------------------------------


@check("detectable_format:json_format")
def json_format(text: str) -> bool:
    """The whole response is JSON, in a fence or bare."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


@check("detectable_format:number_bullet_lists")
def number_bullet_lists(text: str, num_bullets: Count) -> bool:
    """Exactly so many lines that begin with one asterisk (and something after it) or a dash."""
    stars = re.findall(r"^[^\S\n]*\*[^\*].*$", text, flags=re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-", text, flags=re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


@check("detectable_format:number_highlighted_sections")
def number_highlighted_sections(text: str, num_highlights: Count) -> bool:
    """At least so many spans in asterisks, within a line; a bold one counts twice, as published."""
    single = [mark for mark in re.findall(r"\*[^\n\*]*\*", text) if mark.strip("*").strip()]
    double = [mark for mark in re.findall(r"\*\*[^\n\*]*\*\*", text) if mark.strip("*").strip()]
    return len(single) + len(double) >= num_highlights


@check("detectable_format:multiple_sections")
def multiple_sections(text: str, section_spliter: Text, num_sections: Count) -> bool:
    """At least so many sections that begin with the word and a number (``SECTION 1``)."""
    found = re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)
    return len(found) >= num_sections


@check("detectable_format:title")
def title(text: str) -> bool:
    """A title in double angular brackets, within a line."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


@check("detectable_format:constrained_response")
def constrained_response(text: str) -> bool:
    """One of the three answers IFEval's prompts allow, among whatever else."""
    answers = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    return any(answer in text for answer in answers)


@check("detectable_content:number_placeholders")
def number_placeholders(text: str, num_placeholders: Count) -> bool:
    """At least so many pairs of square brackets, each within a line."""
    return sum(map(_count_brackets, text.split("\n"))) >= num_placeholders


@check("detectable_content:postscript")
def postscript(text: str, postscript_marker: Text = "P.S.") -> bool:
    """The marker is somewhere; of ``P.P.S`` and ``P.S.``, spaces after their full stops do not matter."""
    marker = postscript_marker.strip().lower()
    patterns = {"p.p.s": r"p\.\s?p\.\s?s", "p.s.": r"p\.\s?s\."}
    return re.search(patterns.get(marker, re.escape(marker)), text.lower()) is not None


# --- combination, start and end ----------------------------------------------------------------------


@check("combination:repeat_prompt")
def repeat_prompt(text: str, prompt_to_repeat: Text) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@check("combination:two_responses")
def two_responses(text: str) -> bool:
    """Two different responses, separated by six asterisks."""
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    filled = [part.strip() for part in parts if part.strip()]
    return len(filled) == 2 and filled[0] != filled[1]


@check("startend:end_checker")
def end_phrase(text: str, end_phrase: Text) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@check("startend:start_checker")
def start_phrase(text: str, start_phrase: Text) -> bool:
    """Not of IFEval: the counterpart of ``end_checker``."""
    return text.strip().strip('"').lower().startswith(start_phrase.strip().lower())


@check("startend:quotation")
def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


# --- helpers -----------------------------------------------------------------------------------------


def _count_filled(parts: list[str]) -> int:
    return sum(bool(part.strip()) for part in parts)


def _count_brackets(line: str) -> int:
    """Pairs of square brackets, each from an opening one to the next closing one."""
    # Not the pattern \[.*?\]: it scans to the line's end from every bracket that is never closed.
    count = end = 0
    while (start := line.find("[", end)) >= 0 and (end := line.find("]", start) + 1) > 0:
        count += 1
    return count
