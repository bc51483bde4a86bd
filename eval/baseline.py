"""A baseline's answers from a file: matched to examples by key or by prompt, never by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.base import Answer, Conversation, Example
from eval.sources import file_rows, keyed
from prefopt.errors import DataError

_KEYS = ("key", "id", "question_id", "instruction", "prompt")
_ANSWERS = ("answer", "response", "output", "completion")


def answers_from_file(path: Path, examples: Sequence[Example]) -> dict[str, list[Conversation]]:
    """One conversation an example.

    A row has the example's ``key`` (also ``id``, ``question_id``), or its text (``prompt``, ``instruction``), and
    an ``answer`` (``response``, ``output``): a text, or a list of texts, one a turn.

    Raises: DataError naming file and line for a row without these or a second row for one example, and for
        examples without an answer, with their number.
    """
    rows = file_rows(path)
    if not rows:
        raise DataError(f"{path}: holds no rows")
    column = next((name for name in _KEYS if name in rows[0].data), None)
    if column is None:
        raise DataError(
            f"{rows[0].where}: none of the columns {', '.join(_KEYS)}: nothing to match by"
        )
    found = keyed(rows, lambda data: _text(data.get(column)), "answer")
    by_text = column in ("instruction", "prompt")
    wanted = {each.key: _text(each.prompt) if by_text else each.key for each in examples}
    missing = [key for key, name in wanted.items() if name not in found]
    if missing:
        raise DataError(
            f"{path}: no answer for {len(missing)} of {len(examples)} examples (matched by {column!r}), e.g. "
            f"{missing[0]!r}. Answer all of them, or lower --limit"
        )
    return {
        key: [_conversation(found[name].where, found[name].data)] for key, name in wanted.items()
    }


def _text(value: Any) -> str:
    """A prompt as one text, whatever its shape: the last user turn of messages."""
    if isinstance(value, str) or value is None:
        return value or ""
    if isinstance(value, Sequence):
        return (
            str(value[-1]["content"]) if value and isinstance(value[-1], dict) else str(value[-1])
        )
    return str(value)


def _conversation(where: str, data: dict[str, Any]) -> Conversation:
    value = next((data[name] for name in _ANSWERS if data.get(name) is not None), None)
    if value is None:
        raise DataError(
            f"{where}: no answer: one of the columns {', '.join(_ANSWERS)} must hold it"
        )
    turns = [value] if isinstance(value, str) else list(value)
    return tuple(Answer(str(turn)) for turn in turns)
