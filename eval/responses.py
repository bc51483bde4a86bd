"""Files of answers that others generated: a benchmark's published ones, or a baseline's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.base import Answer, Conversation, Example
from eval.harness_samples import unwrapped
from eval.sources import columns, file_rows, keyed
from prefopt.data.readers import RawRow
from prefopt.errors import DataError
from prefopt.recipe.thinking import Tags
from prefopt.signals import thinking

_KEYS = ("key", "id", "question_id", "instruction", "prompt")
_ANSWERS = ("answer", "response", "output", "completion")


def response_rows(path: Path, *names: str) -> list[RawRow]:
    """The rows of a file of answers, in file order, no two of them one model's answer to one problem.

    Rows of lm-evaluation-harness's samples are read as its documents with a ``response``.

    Args:
        names: columns that identify a problem; the first that a row has is taken. ``model``, where a row has
            it, is part of what identifies the answer.

    Raises: DataError for a row with none of these columns, or two answers to one problem (both lines named).
    """

    def identity(data: Mapping[str, Any]) -> str | None:
        problem = next((data[name] for name in names if data.get(name) not in (None, "")), None)
        if problem is None:
            return None
        return f"{data['model']}: {problem}" if data.get("model") else str(problem)

    return list(keyed(unwrapped(file_rows(path)), identity, "answer", *names).values())


def model_of(row: RawRow) -> str:
    """Whose answer it is; ``""`` in a file that does not say."""
    return str(row.data.get("model") or "")


def response_of(row: RawRow, name: str = "response") -> Answer:
    """The answer in a column; a null is an answer that is not there.

    Raises: DataError for a row without the column, or with anything but text in it.
    """
    if name not in row.data:
        raise DataError(f"{row.where}: no column {name!r}; its columns: {columns(row)}")
    return answer_of(row.data[name], f"{row.where}: column {name!r}")


def answer_of(value: Any, where: str) -> Answer:
    """A published answer from what a file has in its place. Raises: DataError for anything but text or null."""
    if value is None:
        return Answer("", problem="null_response")
    if not isinstance(value, str):
        raise DataError(f"{where} is {type(value).__name__}: must be text, or null for no answer")
    return Answer(value)


UNENDED = "unended_thinking"
"""The problem of a response that never leaves its thinking: it has no answer."""


def answered(response: Answer, tags: Tags) -> Answer:
    """What a response says outside its thinking; one that never leaves it is empty, and has that problem."""
    if response.problem is not None:
        return response
    text = thinking.answer_of(response.text, tags, response.opened)
    return (
        replace(response, text="", problem=UNENDED)
        if text is None
        else replace(response, text=text)
    )


class Answered(Mapping[str, list[Conversation]]):
    """The answers in the samples of every example, made when asked for.

    Args:
        samples: whole responses.
        tags: the marks of the thinking; None takes responses as they are.
    """

    def __init__(self, samples: Mapping[str, list[Conversation]], tags: Tags) -> None:
        self._samples = samples
        self._tags = tags

    def __getitem__(self, key: str) -> list[Conversation]:
        found = self._samples[key]
        return [tuple(answered(each, self._tags) for each in turns) for turns in found]

    def __iter__(self) -> Iterator[str]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)


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
    found = keyed(rows, lambda data: _text(data.get(column)), "answer", column)
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
