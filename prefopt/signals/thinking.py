"""Where an answer begins: what a response says outside its thinking. Everything that reads answers asks here."""

from __future__ import annotations

import functools
import re

from prefopt.recipe.thinking import DEFAULT_TAGS, Tags, ThinkingTags, pairs_of

__all__ = ["DEFAULT_TAGS", "Tags", "ThinkingTags", "answer_of"]

_QUOTES = "\"'`"


def answer_of(text: str, tags: Tags = DEFAULT_TAGS, opened: str = "") -> str | None:
    """What stands outside the thinking of a response: all of it where there is none, None where it never ends.

    Whatever stands between a begin and the next end is left out. An end without a begin closes a thinking that the
    prompt began: what stands before it is left out. A begin within thinking begins nothing, and a mark right
    between two quotes (``"</think>"``, a program's string) is none.

    Args:
        text: a response as it was sampled.
        tags: of the model.
        opened: what the prompt's rendering ends with, where that is a mark; see
            `prefopt.recipe.thinking.mark_at_end`. A response after a begin thinks from its first character on.
    """
    pairs = pairs_of(tags)
    if not pairs:
        return text
    kept, start = "", 0
    open_by = _begun_by(opened, pairs)
    for match in _marks(pairs).finditer(text):
        if _is_quoted(text, match):
            continue
        number, is_end = _which(match.group(), pairs)
        if is_end and open_by in (None, number):
            kept = kept if open_by == number else ""
            open_by, start = None, match.end()
        elif not is_end and open_by is None:
            kept, open_by = kept + text[start : match.start()], number
    return None if open_by is not None else kept + text[start:]


@functools.lru_cache(maxsize=64)
def _marks(pairs: tuple[ThinkingTags, ...]) -> re.Pattern[str]:
    marks = {mark for pair in pairs for mark in (pair.begin, pair.end)}
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)


def _which(mark: str, pairs: tuple[ThinkingTags, ...]) -> tuple[int, bool]:
    """The number of the pair that ``mark`` is of, and whether it is its end."""
    mark = mark.casefold()
    ends = [pair.end.casefold() for pair in pairs]
    if mark in ends:
        return ends.index(mark), True
    return [pair.begin.casefold() for pair in pairs].index(mark), False


def _begun_by(opened: str, pairs: tuple[ThinkingTags, ...]) -> int | None:
    begins = [pair.begin.casefold() for pair in pairs]
    mark = opened.strip().casefold()
    return begins.index(mark) if mark in begins else None


def _is_quoted(text: str, match: re.Match[str]) -> bool:
    before, after = text[: match.start()][-1:], text[match.end() :][:1]
    return before == after and before != "" and before in _QUOTES
