"""The marks between which a model thinks, as the key ``thinking`` names them. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer


@dataclass(frozen=True)
class ThinkingTags:
    """The marks between which a model thinks; case aside."""

    begin: str = "<think>"
    end: str = "</think>"


DEFAULT_TAGS: tuple[ThinkingTags, ...] = (
    ThinkingTags(),  # DeepSeek-R1, Qwen3 and most others
    ThinkingTags("<thinking>", "</thinking>"),
    ThinkingTags("<thought>", "</thought>"),
    ThinkingTags("<reasoning>", "</reasoning>"),
    ThinkingTags("[THINK]", "[/THINK]"),  # Magistral
    ThinkingTags("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
    ThinkingTags("<seed:think>", "</seed:think>"),  # Seed-OSS
    ThinkingTags("◁think▷", "◁/think▷"),  # Kimi
)

Tags = ThinkingTags | Sequence[ThinkingTags] | None
"""One pair of marks or several; None takes every text as it is."""

_MARK_AT_END = re.compile(r"[<\[◁][^<>\[\]◁▷\s]{1,40}[>\]▷]\s*$")


def mark_at_end(rendered: str) -> str:
    """The mark that a prompt's rendering ends with (``<think>``), else "": the template has begun the thinking."""
    found = _MARK_AT_END.search(rendered[-64:])
    return found.group().strip() if found else ""


def names_a_mark(text: str, tags: Tags) -> str | None:
    """The first of the marks that ``text``, perhaps a regular expression, spells out; None if there is none."""
    plain = text.replace("\\", "")
    return next(
        (mark for pair in pairs_of(tags) for mark in (pair.begin, pair.end) if mark in plain), None
    )


def tags_of(value: Any) -> tuple[ThinkingTags, ...] | None:
    """What a settings file says: null, a begin and an end, or a list of such pairs.

    Raises: ValueError for anything else.
    """
    if value is None or isinstance(value, tuple):
        return value
    pairs = [value] if isinstance(value, list) and value and isinstance(value[0], str) else value
    right = isinstance(pairs, list) and bool(pairs)
    if not right or not all(map(_is_pair, pairs)):
        raise ValueError(
            'must be ["<think>", "</think>"]: the marks that begin and end the thinking, two different texts; a '
            "list of such pairs; or null to read responses as they are"
        )
    return tuple(ThinkingTags(begin.strip(), end.strip()) for begin, end in pairs)


Thinking = Annotated[
    tuple[ThinkingTags, ...] | None,
    BeforeValidator(tags_of),
    PlainSerializer(lambda tags: tags and [[each.begin, each.end] for each in tags]),
]
"""A settings key ``thinking``, as `answer_of` takes it."""


def _is_pair(value: Any) -> bool:
    texts = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    return texts and len(value) == 2 and all(map(str.strip, value)) and value[0] != value[1]


def pairs_of(tags: Tags) -> tuple[ThinkingTags, ...]:
    """The pairs of marks, none where thinking is not looked for."""
    if tags is None:
        return ()
    return (tags,) if isinstance(tags, ThinkingTags) else tuple(tags)
