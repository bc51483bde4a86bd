"""One function for each instruction of IFEval: does a response follow it?

Names and arguments are those of IFEval (arXiv:2311.07911), so its rows, and training sets made in its
image, work as they are. Left out: ``language:response_language``, which needs a language detector; and the
upper- and lower-case checks do not ask whether the text is English. Sentences are split by rule, not by
nltk's model.

A check gets the response and its arguments and returns a bool. Arguments are checked before any scoring.
"""

from __future__ import annotations

import inspect
import json
import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, TypeVar

Check = Callable[..., bool]
Relation = Literal["at least", "less than"]

CHECKS: dict[str, Check] = {}
"""By IFEval's instruction id."""

_Check = TypeVar("_Check", bound=Check)


def check(name: str) -> Callable[[_Check], _Check]:
    """Files a function under an instruction id."""

    def file(fn: _Check) -> _Check:
        CHECKS[name] = fn
        return fn

    return file


def argument_problem(name: str, args: dict[str, Any]) -> str | None:
    """What is wrong with an instruction's name or arguments, in words; None if nothing is."""
    if name not in CHECKS:
        return f"unknown constraint {name!r}. Known: {', '.join(sorted(CHECKS))}"
    parameters = list(inspect.signature(CHECKS[name]).parameters.values())[1:]
    known = {p.name for p in parameters}
    required = {p.name for p in parameters if p.default is p.empty}
    missing, unknown = sorted(required - args.keys()), sorted(args.keys() - known)
    if missing or unknown:
        return f"{name}: arguments missing: {missing or 'none'}, unknown: {unknown or 'none'}"
    return None


def _compare(count: int, relation: Relation, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


# --- length ------------------------------------------------------------------------------------------


@check("length_constraints:number_words")
def number_words(text: str, num_words: int, relation: Relation = "at least") -> bool:
    """Words are runs of letters, digits and underscores, as in IFEval."""
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


@check("length_constraints:number_sentences")
def number_sentences(text: str, num_sentences: int, relation: Relation = "at least") -> bool:
    return _compare(len(split_sentences(text)), relation, num_sentences)


@check("length_constraints:number_paragraphs")
def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are separated by the markdown rule ``***``; an empty one inside fails."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = parts[1:-1]
    return all(part.strip() for part in inner) and _count_filled(parts) == num_paragraphs


@check("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(
    text: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """Paragraphs are separated by two line breaks; counted from 1, the n-th begins with the word."""
    parts = re.split(r"\n\n", text)
    if nth_paragraph > _count_filled(parts) or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    word = re.split(r"[.,?!'\"]", word)[0].lower()
    return _count_filled(parts) == num_paragraphs and word == first_word.lower()


# --- words -------------------------------------------------------------------------------------------


@check("keywords:existence")
def keywords(text: str, keywords: list[str]) -> bool:
    return all(_search(word, text) for word in keywords)


@check("keywords:frequency")
def keyword_frequency(
    text: str, keyword: str, frequency: int, relation: Relation = "at least"
) -> bool:
    count = len(re.findall(re.escape(keyword), text, flags=re.IGNORECASE))
    return _compare(count, relation, frequency)


@check("keywords:forbidden_words")
def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(_search(rf"\b{re.escape(word)}\b", text, raw=True) for word in forbidden_words)


@check("keywords:letter_frequency")
def letter_frequency(
    text: str, letter: str, let_frequency: int, let_relation: Relation = "at least"
) -> bool:
    return _compare(Counter(text.lower())[letter.lower()], let_relation, let_frequency)


# --- case and punctuation ----------------------------------------------------------------------------


@check("change_case:english_capital")
def all_capital(text: str) -> bool:
    return text.isupper()


@check("change_case:english_lowercase")
def all_lowercase(text: str) -> bool:
    return text.islower()


@check("change_case:capital_word_frequency")
def capital_word_frequency(
    text: str, capital_frequency: int, capital_relation: Relation = "at least"
) -> bool:
    words = re.findall(r"\w+(?:[-'’.]\w+)*|[^\w\s]+", text)
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


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
def number_bullet_lists(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


@check("detectable_format:number_highlighted_sections")
def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    single = [mark for mark in re.findall(r"\*[^\n\*]*\*", text) if mark.strip("*").strip()]
    double = [mark for mark in re.findall(r"\*\*[^\n\*]*\*\*", text) if mark.strip("*").strip()]
    return len(single) + len(double) >= num_highlights


@check("detectable_format:multiple_sections")
def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections that begin with the word and a number (``SECTION 1``)."""
    parts = re.split(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)
    return len(parts) - 1 >= num_sections


@check("detectable_format:title")
def title(text: str) -> bool:
    """A title in double angular brackets."""
    return any(found.strip("<>").strip() for found in re.findall(r"<<[^\n]+>>", text))


@check("detectable_format:constrained_response")
def constrained_response(text: str) -> bool:
    """One of the three answers IFEval's prompts allow."""
    answers = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    return any(answer in text.strip() for answer in answers)


@check("detectable_content:number_placeholders")
def number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


@check("detectable_content:postscript")
def postscript(text: str, postscript_marker: str = "P.S.") -> bool:
    patterns = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = patterns.get(postscript_marker, rf"\s*{re.escape(postscript_marker.lower())}.*$")
    return re.search(pattern, text.lower(), flags=re.MULTILINE) is not None


# --- combination, start and end ----------------------------------------------------------------------


@check("combination:repeat_prompt")
def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
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
def end_phrase(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@check("startend:start_checker")
def start_phrase(text: str, start_phrase: str) -> bool:
    """Not of IFEval: the counterpart of ``end_checker``."""
    return text.strip().strip('"').lower().startswith(start_phrase.strip().lower())


@check("startend:quotation")
def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


# --- helpers -----------------------------------------------------------------------------------------

_ABBREVIATION = re.compile(
    r"\b(?:mr|mrs|ms|dr|prof|sr|jr|st|vs|etc|e\.g|i\.e|no|inc|ltd|co|u\.s|a\.m|p\.m|[a-z])\.$",
    flags=re.IGNORECASE,
)


def split_sentences(text: str) -> list[str]:
    """Sentences: they end with ``.``, ``!`` or ``?`` before white space, abbreviations and initials aside."""
    sentences: list[str] = []
    start = 0
    for end in re.finditer(r"[.!?]+[\"'”’)\]*]*(?=\s|$)", text):
        piece = text[start : end.end()]
        following = text[end.end() :].lstrip()[:1]
        if (
            end.group() == "."
            and following
            and (_ABBREVIATION.search(piece) or following.islower())
        ):
            continue
        sentences.append(piece.strip())
        start = end.end()
    rest = text[start:].strip()
    return [*sentences, rest] if rest.strip(string.punctuation + string.whitespace) else sentences


def _count_filled(parts: list[str]) -> int:
    return sum(bool(part.strip()) for part in parts)


def _search(word: str, text: str, *, raw: bool = False) -> bool:
    return re.search(word if raw else re.escape(word), text, flags=re.IGNORECASE) is not None
