"""The canonical row every format becomes, and the reasons a row may be refused for."""

from __future__ import annotations

import difflib
import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from prefopt.data.options import PLAIN, RenderOptions
from prefopt.data.readers import RawRow
from prefopt.errors import DataError

_SHOWN = 80

Message: TypeAlias = dict[str, Any]
"""One chat turn: ``role``, ``content`` (a string) and whatever else the chat template reads."""


class Reject(enum.StrEnum):
    """Why a row never reaches a loss. Counted, and listed in the rejects file; nothing is ever cut."""

    BROKEN_TEXT = "broken_text"
    """Some text of the row holds half of a surrogate pair: nothing can encode it, a tokenizer neither."""
    EMPTY_PROMPT = "empty_prompt"
    EMPTY_CHOSEN = "empty_chosen"
    EMPTY_REJECTED = "empty_rejected"
    IDENTICAL = "identical"
    """Both responses are the same, as messages or once rendered to tokens."""
    TIE = "tie"
    """Equal scores, with ``drop_ties``."""
    PROMPTS_DIFFER = "prompts_differ"
    """Chosen and rejected (or the prompt column) do not continue one and the same dialogue."""
    PROMPT_ANSWERED = "prompt_answered"
    """The prompt ends with the assistant's turn already: is a side its continuation, or a second turn in a row?"""
    NOT_ASSISTANT = "not_assistant"
    """A side does not end with a turn of the assistant."""
    TEMPLATE_REFUSED = "template_refused"
    """The chat template raised on this row, e.g. because roles do not alternate."""
    PROMPT_NOT_PREFIX = "prompt_not_prefix"
    """The tokens of the prompt are not the first tokens of prompt + response."""
    TURN_NOT_PREFIX = "turn_not_prefix"
    """With ``turns: all``: the dialogue up to some turn of the assistant is not how the whole dialogue begins."""
    NOT_RENDERED = "not_rendered"
    """The chat template leaves out part of what the row says: a thought, a tool call, a tool, a system message."""
    CONTROL_TOKEN = "control_token"
    """A text spells out a control token of the tokenizer, which would close or open a turn within it."""
    NO_LOSS = "no_loss"
    """Its messages say that no turn carries loss."""
    NO_SIGNAL = "no_signal"
    """A prompt that no signal is for (``only_where``)."""
    PROMPT_TOO_LONG = "prompt_too_long"
    TOO_LONG = "too_long"


@dataclass(frozen=True)
class Row:
    """One row in the one shape the renderer takes.

    ``prompt`` is plain text or chat messages; ``responses`` holds chosen, then rejected (chosen alone
    for SFT, the one response of a sample), as text if the prompt is text, else one assistant message each.
    ``scores`` pairs with it.
    """

    prompt: str | list[Message]
    responses: tuple[str | Message, ...]
    scores: tuple[float | None, ...]
    advantage: float | None = None
    """Of a sample row's response."""
    ended: bool = True
    """False where the response stops within its turn."""
    source_prompt: str | list[Message] | None = None
    """The prompt before a reward was written into it: rows of one prompt stay together by it."""
    earlier: tuple[int, ...] = ()
    """Places in ``prompt`` of the turns that are trained on as the response is (``turns: all``)."""
    trained: bool = True
    """False where the response carries no loss itself: its message says so."""
    options: RenderOptions = PLAIN
    """What it is rendered with beside its messages."""


@dataclass(frozen=True)
class Labels:
    """What a sample row says of its response, and which response that is."""

    reward: str | None
    """Column; None where the source has none and none is needed."""
    advantage: str | None
    ended: str | None = None
    needs_reward: bool = False
    needs_advantage: bool = False
    side: str = ""
    """Of a pair that is read as two samples: ``chosen`` or ``rejected``, which ends the row's id."""


@dataclass(frozen=True)
class Refused:
    """A row, or a rendering, that is refused, and why; ``detail`` quotes what is not obvious."""

    reason: Reject
    detail: str | None = None
    lengths: tuple[int, ...] | None = None
    """Tokens of the prompt and of each response, where it came that far."""


def is_empty(part: str | Message | list[Message]) -> bool:
    """No text at all; a message that calls tools or carries other fields is not empty."""
    if isinstance(part, str):
        return not part.strip()
    if isinstance(part, list):
        return all(is_empty(message) for message in part)
    return not part["content"].strip() and not set(part) - {"role", "content"}


def refusal(row: Row, *, drop_ties: bool) -> Refused | None:
    """Why a well-formed row must not reach a loss, if so."""
    if is_empty(row.prompt):
        return Refused(Reject.EMPTY_PROMPT)
    for response, reason in zip(
        row.responses, (Reject.EMPTY_CHOSEN, Reject.EMPTY_REJECTED), strict=False
    ):
        if is_empty(response):
            return Refused(reason)
    if not row.trained and not row.earlier:
        return Refused(Reject.NO_LOSS)
    for place in row.earlier:
        if is_empty(row.prompt[place]):
            return Refused(Reject.EMPTY_CHOSEN, f"turn {place + 1} is empty")
    if len(row.responses) == 2 and row.responses[0] == row.responses[1]:
        return Refused(Reject.IDENTICAL)
    if drop_ties and None not in row.scores and len(set(row.scores)) == 1:
        return Refused(Reject.TIE, f"both scores are {row.scores[0]}")
    return None


def answered_turns(dialogue: list[Message]) -> tuple[int, ...]:
    """Places of the assistant's turns, but for one that opens a dialogue: nothing asks for it."""
    return tuple(
        place
        for place, message in enumerate(dialogue)
        if message["role"] == "assistant" and not is_empty(dialogue[:place])
    )


def has_column(data: dict[str, Any], path: str) -> bool:
    """Whether a row holds the column ``path``; a dot descends unless a key contains it literally."""
    if path in data:
        return True
    head, dot, rest = path.partition(".")
    inner = data.get(head)
    return bool(dot) and isinstance(inner, dict) and has_column(inner, rest)


def column(row: RawRow, path: str) -> Any:
    """The value of a column; DataError naming the columns there are, nearest first."""
    data: Any = row.data
    if has_column(data, path):
        while path not in data:
            head, _, path = path.partition(".")
            data = data[head]
        return data[path]
    raise DataError(
        f"{row.where}: no column {path!r}; it has {', '.join(nearest(path, column_paths(row.data)))}. "
        "Name the right one under columns"
    )


def score(row: RawRow, path: str | None) -> float | None:
    """The finite number in a score column (CSV cells are parsed); None for null or no column."""
    value = None if path is None else column(row, path)
    if value is None or value == "":
        return None
    number = math.nan if isinstance(value, bool) else as_float(value)
    if math.isfinite(number):
        return number
    raise DataError(
        f"{row.where}: column {path!r} = {shown(value)}: a score must be a finite number"
    )


def as_float(value: Any) -> float:
    """``value`` as a float; NaN for what is no number, or beyond one."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def shown(value: Any) -> str:
    """A value as an error quotes it: short, and printable on any terminal."""
    text = (
        f"a {type(value).__name__} of {len(value):,}"
        if isinstance(value, dict | list)
        else ascii(value)
    )
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def row_id(row: RawRow, path: str | None) -> str:
    """What names a row: its id column, else where it stands; always the latter where its text is broken."""
    return row.where if path is None or row.flaw is not None else str(column(row, path))


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """``known``, most similar to ``name`` first."""
    return sorted(known, key=lambda k: (-difflib.SequenceMatcher(None, name, k).ratio(), k))


def column_paths(data: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all columns, nested objects included."""
    found: list[str] = []
    for key, value in data.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, dict):
            found += column_paths(value, f"{prefix}{key}.")
    return found
