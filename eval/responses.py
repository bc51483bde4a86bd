"""Files of answers that others generated: one row for one answer of one model to one problem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.base import Answer
from eval.sources import columns, file_rows, keyed
from prefopt.data.readers import RawRow
from prefopt.errors import DataError


def response_rows(path: Path, *names: str) -> list[RawRow]:
    """The rows of a file of answers, in file order, no two of them one model's answer to one problem.

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

    return list(keyed(file_rows(path), identity, "answer").values())


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
