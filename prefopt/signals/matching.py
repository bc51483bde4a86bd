"""Verifiers that compare text: equal, a letter of a multiple choice, a regular expression."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Annotated

import regex as regex_lib
from pydantic import AfterValidator, Field, PositiveFloat

from prefopt.errors import DataError
from prefopt.recipe.registry import signal
from prefopt.signals.base import Signal, column, per_response
from prefopt.signals.choices import extract_choice, gold_choice
from prefopt.types import Prompt

__all__ = ["exact_match", "extract_choice", "multiple_choice", "regex"]

REGEX_TIMEOUT_S = 1.0


def _compiles(pattern: str) -> str:
    try:
        regex_lib.compile(pattern)
    except regex_lib.error as error:
        raise ValueError(f"must be a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
NumChoices = Annotated[int, Field(ge=2, le=26)]


@signal(
    "exact_match",
    source="string equality",
    needs_fields=("answer",),
    reads_answer=True,
    no_answer=0.0,
)
def exact_match(
    *, answer: str = "answer", extract: Pattern | None = None, ignore_case: bool = False
) -> Signal:
    """1.0 if the response is the gold text, white space at the ends and runs of it aside, else 0.0.

    Args:
        answer: column with the gold text, or a list of texts of which any will do.
        extract: regular expression; its last match in the response (its first group, if it has one) is
            compared instead of the whole response. No match is wrong.
        ignore_case: compare without case.
    """

    def normal(text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if ignore_case else text

    def score(prompt: Prompt, text: str) -> float:
        gold = column(prompt, answer)
        golds = gold if isinstance(gold, list | tuple) else [gold]
        found = text if extract is None else _last_match(extract, text)
        return float(found is not None and normal(found) in {normal(str(g)) for g in golds})

    return per_response(score)


@signal("regex", source="regular expression", reads_answer=True, no_answer=0.0)
def regex(*, pattern: Pattern, timeout_s: PositiveFloat = REGEX_TIMEOUT_S) -> Signal:
    """1.0 if the pattern is found in the response, else 0.0. ``^`` and ``$`` are the ends of the whole text.

    Args:
        pattern: Python regular expression; ``(?s)``, ``(?i)`` and ``(?m)`` set flags.
        timeout_s: longest time for one response; then it does not match. Patterns that backtrack without
            end meet model-written text sooner or later.
    """
    compiled = regex_lib.compile(pattern)

    def score(prompt: Prompt, text: str) -> float:
        try:
            return float(compiled.search(text, timeout=timeout_s) is not None)
        except TimeoutError:
            return 0.0

    return per_response(score)


@signal(
    "multiple_choice",
    source="letter extraction",
    needs_fields=("answer", "choices"),
    reads_answer=True,
    no_answer=0.0,
)
def multiple_choice(
    *, answer: str = "answer", num_choices: NumChoices = 4, choices: str | None = None
) -> Signal:
    r"""1.0 if the response chooses the gold letter, else 0.0; see `extract_choice` for how it is read.

    Args:
        answer: column with the gold choice: a letter, or a number counted from 0.
        num_choices: the letters are the first so many of the alphabet.
        choices: column with the texts of the choices, in order. A response may then say a text in place of its
            letter, the gold choice may be one, and each row has as many letters as texts.
    """

    def score(prompt: Prompt, text: str) -> float:
        texts = None if choices is None else _texts(prompt, choices)
        letters = string.ascii_uppercase[: num_choices if texts is None else len(texts)]
        wanted = gold_choice(column(prompt, answer), letters, texts)
        if wanted is None:
            return float("nan")
        return float(extract_choice(text, letters, texts) == wanted)

    return per_response(score)


def _texts(prompt: Prompt, name: str) -> list[str]:
    """The choices of a row. Raises: DataError for anything but 2 to 26 of them."""
    found = column(prompt, name)
    if isinstance(found, Mapping):  # the hub's shape: {"text": [...], "label": [...]}
        found = found.get("text")
    if not isinstance(found, list | tuple) or not 2 <= len(found) <= 26:
        raise DataError(
            f"prompt {prompt.id}: column {name!r} must be a list of 2 to 26 texts, one a choice, got {found!r}"
        )
    return [str(each) for each in found]


def _last_match(pattern: str, text: str) -> str | None:
    found = None
    try:
        for match in regex_lib.finditer(pattern, text, timeout=REGEX_TIMEOUT_S):
            found = match.group(1) if match.re.groups else match.group()
    except TimeoutError:
        return None
    return found
