"""Where an answer begins: what a response says after it has thought. Everything that reads answers asks here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ThinkingTags:
    """The marks between which a model thinks."""

    begin: str = "<think>"
    end: str = "</think>"


DEFAULT_TAGS = ThinkingTags()


def answer_of(text: str, tags: ThinkingTags | None = DEFAULT_TAGS) -> str | None:
    """What stands after the thinking of a response: the whole text where there is none, None where it never ends.

    Templates that open the thinking themselves leave its begin to the prompt, so a lone end mark closes it too.

    Args:
        text: a response as it was sampled.
        tags: None takes every text as it is.
    """
    if tags is None:
        return text
    before, closed, after = text.rpartition(tags.end)
    rest = after if closed else text
    return None if tags.begin in rest else rest
