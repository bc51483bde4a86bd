"""JSON as its text says it: what Python's reader would change, guess or die of is refused with a reason.

Rows, replies of servers and files of a run are read by this one function.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_DEPTH = 100
"""Objects and arrays within each other. What goes deeper exhausts the stack of whoever walks it next."""
_LONGEST_NUMBER = 309
"""Digits of the largest float; Python itself reads integers of up to 4,300."""
_SHOWN = 20
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")
_GAP = re.compile(r"[ \t\n\r]*")


class BadJson(ValueError):
    """Text that is no JSON, or that says what no reader can hold. The message is the reason.

    Args:
        reason: what is wrong.
        position: where in the text, in characters; None where it is not known.
    """

    def __init__(self, reason: str, position: int | None = None) -> None:
        super().__init__(reason)
        self.position = position


def parse_json(text: str, *, twice: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: with nothing but white space around the value.
        twice: take the last of a key that is given twice: a server's habit, where nobody can mend its text.

    NaN and Infinity are read: Python writes them, and whoever needs a number says that they are none.
    Raises: BadJson for a syntax error, a key given twice in one object, a number that no float holds, or values
        nested deeper than `MAX_DEPTH`.
    """
    decoder = _LENIENT if twice else _DECODER
    value, end = parse_json_at(text, _skip(text, 0), decoder)
    end = _skip(text, end)
    if end != len(text):
        raise BadJson("Extra data", end)
    return value


def parse_json_at(
    text: str, start: int, decoder: json.JSONDecoder | None = None
) -> tuple[Any, int]:
    """The value that begins at ``start``, and where it ends. Raises: BadJson as `parse_json`."""
    try:
        value, end = (decoder or _DECODER).raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise BadJson(error.msg, error.pos) from error
    except RecursionError as error:
        raise BadJson(_DEEP) from error
    if _is_deep(text, start, end) and _depth(value) > MAX_DEPTH:
        raise BadJson(_DEEP)
    return value, end


def parse_items(text: str) -> Iterator[Any]:
    """The items of a JSON array, one at a time. Raises: BadJson as `parse_json`, when the item is reached."""
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        raise BadJson("an array begins with [", at)
    at = _skip(text, at + 1)
    more = text[at : at + 1] != "]"
    while more:
        item, at = parse_json_at(text, at)
        yield item
        at = _skip(text, at)
        more = text[at : at + 1] == ","
        at = _skip(text, at + 1) if more else at
    if text[at : at + 1] != "]":
        raise BadJson("Expecting ',' or ']'", at)
    if (end := _skip(text, at + 1)) != len(text):
        raise BadJson("Extra data", end)


def may_hold_halves(text: str) -> bool:
    """Whether what is parsed from ``text``, which was UTF-8, may hold half of a surrogate pair: quick to know."""
    return _HALF_ESCAPED.search(text) is not None


def half_surrogate(value: Any) -> str | None:
    """Where a value holds half of a surrogate pair, as a dotted path; None where it holds none.

    No encoding can write such a string.
    """
    return next((".".join(path) for path, item in _strings(value, ()) if _HALF.search(item)), None)


def not_json(value: Any, path: tuple[str, ...] = ()) -> str | None:
    """What in a value no JSON text can hold, with its place; None for one that can be written and read again."""
    place = f"{'.'.join(path)} is " if path else ""
    if value is None or isinstance(value, bool | int):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{place}{value}"
    if isinstance(value, str):
        return f"{place}text with half a surrogate pair" if _HALF.search(value) else None
    if isinstance(value, Mapping):
        keys = (not_json(key, (*path, "a key")) for key in value)
        items = (not_json(item, (*path, str(key))) for key, item in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        keys, items = (), (not_json(item, (*path, str(n))) for n, item in enumerate(value))
    else:
        return f"{place}of the type {type(value).__name__}"
    return next((each for each in (*keys, *items) if each is not None), None)


_DEEP = f"values are nested more than {MAX_DEPTH} deep"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise BadJson(f"the key {twice[:_SHOWN]!a} is given twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) < _LONGEST_NUMBER:
        return int(text)
    raise BadJson(
        f"a number of {len(text):,} digits ({text[:_SHOWN]}…) is beyond what a float holds"
    )


def _float(text: str) -> float:
    value = float(text)
    if math.isfinite(value):
        return value
    raise BadJson(f"the number {text[:_SHOWN]} is beyond what a float holds")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, parse_float=_float)
_LENIENT = json.JSONDecoder(parse_int=_integer, parse_float=_float)


def _skip(text: str, start: int) -> int:
    found = _GAP.match(text, start)
    assert found is not None  # the pattern takes nothing, too
    return found.end()


def _is_deep(text: str, start: int, end: int) -> bool:
    """Whether there are brackets enough for it: strings may hold some."""
    return text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [
        item
        for each in level
        if isinstance(each, dict | list)
        for item in (each.values() if isinstance(each, dict) else each)
    ]:
        depth += 1
    return depth


def _strings(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every string within a value, keys included, with its place."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            name = ascii(key)[1:-1] if isinstance(key, str) else str(key)
            yield (*path, name), str(key)
            yield from _strings(item, (*path, name))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _strings(item, (*path, str(number)))
