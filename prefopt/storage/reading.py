"""Files that a run wrote, read back: what they hold, or one sentence with the file and what to do.

The one place that decides what a torn, edited or foreign file of ours is. Three kinds of files, three readers:
`reading` with `load_json` for a file that comes into being whole (a torn one is an error), `log_lines` for an
append-only one (a torn end is what a kill leaves: it is left out and said), `sealed` for one whose every byte
counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from prefopt.errors import DataError, PrefoptError
from prefopt.storage import json_text

logger = logging.getLogger(__name__)

SHAPE_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
"""What taking apart a value of another shape than was written raises: a list for a dict, a text for a number."""

SEAL = "seal"

Kind: TypeAlias = type | tuple[type, ...]
_ABSENT = object()


class UnreadableError(ValueError):
    """Why a file is not what it should be, in words."""


@contextlib.contextmanager
def reading(
    path: Path, what: str, advice: str, error: type[PrefoptError] = DataError
) -> Iterator[None]:
    """Turns what a file that is gone, torn, edited or of another version raises into ``error``, with its name.

    Args:
        what: what the file should be, e.g. ``the record of a run``.
        advice: what to do, without the full stop.
    """
    try:
        yield
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}. {advice}") from problem
    except SHAPE_ERRORS as problem:
        raise error(f"{path}: is not {what} as written: {in_words(problem)}. {advice}") from problem


def in_words(problem: Exception) -> str:
    """What is wrong with a value, for a sentence."""
    if isinstance(problem, KeyError):
        return f"it has no {problem.args[0]!r}" if problem.args else "it lacks a key"
    if isinstance(problem, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(problem).split())[:300] or type(problem).__name__


def parse_json(data: bytes) -> Any:
    """The JSON value of a file's bytes. Raises: UnreadableError."""
    if not data.strip():
        raise UnreadableError("it is empty")
    if b"\0" in data:
        raise UnreadableError("it holds NUL bytes, as a power cut leaves them")
    try:
        return json_text.parse_json(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UnreadableError(f"its byte {error.start} is no UTF-8") from error
    except json_text.BadJson as error:
        at = "" if error.position is None else f" at character {error.position + 1}"
        raise UnreadableError(f"it is cut or edited ({error}{at})") from error


def as_object(
    value: Any, keys: Mapping[str, Kind] = {}, maybe: Mapping[str, Kind] = {}
) -> dict[str, Any]:
    """``value`` as the JSON object it should be. Raises: UnreadableError if it is none, or of another shape.

    Args:
        keys: what it must hold, by key (``a.b`` is ``b`` of ``a``), each with its type.
        maybe: what it may lack, or have as null.
    """
    if not isinstance(value, dict):
        raise UnreadableError(f"it holds {_kind(value)}, not an object")
    for path, kind in {**maybe, **keys}.items():
        found: Any = value
        for key in path.split("."):
            found = found.get(key, _ABSENT) if isinstance(found, dict) else _ABSENT
        if (found is _ABSENT or found is None) and path in maybe:
            continue
        if found is _ABSENT:
            raise UnreadableError(f"it has no {path!r}")
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise UnreadableError(f"its {path!r} is {_kind(found)}")
    return value


def load_json(
    path: Path, keys: Mapping[str, Kind] = {}, maybe: Mapping[str, Kind] = {}
) -> dict[str, Any]:
    """The object in a file; use it inside `reading`. Raises: OSError, UnreadableError."""
    return as_object(parse_json(path.read_bytes()), keys, maybe)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


@dataclass(frozen=True)
class LogLine:
    """One whole line of an append-only file."""

    number: int
    """From 1."""
    start: int
    end: int
    """In bytes."""
    data: bytes

    def row(self, keys: Mapping[str, Kind] = {}) -> dict[str, Any]:
        """Its object. Raises: UnreadableError."""
        return as_object(parse_json(self.data), keys)


def log_lines(path: Path) -> Iterator[LogLine]:
    """The whole lines of an append-only file; what a kill or a power cut left at its end is left out.

    Raises: OSError.
    """
    data = path.read_bytes()
    end, start = _whole_end(data), 0
    for number, line in enumerate(data[:end].split(b"\n")[:-1], 1):
        yield LogLine(number, start, start + len(line) + 1, line)
        start += len(line) + 1


def log_rows(
    path: Path,
    keys: Mapping[str, Kind],
    advice: str,
    error: type[PrefoptError] = DataError,
    *,
    first: Mapping[str, Kind] | None = None,
) -> Iterator[dict[str, Any]]:
    """The objects of `log_lines`. Raises: ``error`` with file and line for what is none, or lacks a key.

    Args:
        keys: what each must hold, as of `as_object`.
        first: what the first line must hold instead.
    """
    try:
        for line in log_lines(path):
            try:
                row = line.row(first if first is not None and line.number == 1 else keys)
            except UnreadableError as problem:
                raise error(f"{path}:{line.number}: {problem}. {advice}") from problem
            yield row
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}. {advice}") from problem


def keep_beside(path: Path) -> Path:
    """A copy of a damaged file under a name that nothing reads; returns it. Raises: OSError."""
    names = [f"{path.name}.damaged", *(f"{path.name}.damaged-{n}" for n in range(2, 1000))]
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    shutil.copyfile(path, aside)
    return aside


def mend_end(path: Path, consequence: str) -> None:
    """Cuts a torn end off an append-only file, so that the next line is not glued to it, and says so.

    Args:
        consequence: what becomes of what was cut, e.g. ``it is done again``.

    Raises: OSError.
    """
    data = path.read_bytes()
    end = _whole_end(data)
    if end == len(data):
        return
    os.truncate(path, end)
    logger.warning(
        "%s: its last %s bytes were cut off by a kill or a power cut; %s",
        path, f"{len(data) - end:,}", consequence,
    )  # fmt: skip


def _whole_end(data: bytes) -> int:
    """Where the whole lines end: after the last line break that no NUL byte is before in its line.

    A file system that lost power leaves zeros where data was not written yet, which JSON never holds.
    """
    end = data.rfind(b"\n") + 1
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        if b"\0" not in data[start:end]:
            break
        end = start
    return end


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` as JSON has it, with a hash of all it says."""
    plain = json.loads(json.dumps(record))  # keys are texts there, which their order depends on
    return {**plain, SEAL: digest(plain)}


def unsealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record that `sealed` was given. Raises: UnreadableError if it was edited, or has no seal."""
    plain = dict(as_object(record, {SEAL: str}))
    if digest({key: value for key, value in plain.items() if key != SEAL}) != plain.pop(SEAL):
        raise UnreadableError(
            "it was edited by hand or damaged (its seal does not fit what it says)"
        )
    return plain
