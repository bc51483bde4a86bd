"""Inputs that are nearly right: real files with bytes flipped, cut and spliced, real values of another type.

What reads them may refuse them, by one of our own errors, and may not take for ever: `steps` counts calls, so that
no machine is too slow.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

T = TypeVar("T")

FEW, MANY = 120, 20_000
"""Inputs of a reader in `make test`, and in `make test-all`."""
_STEPS = 3_000_000
"""Calls of a reader over one small file; a file of the size is read in some thousands."""

NASTY_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", " ",
    "x", "0", "nan", "1e400", "\x00", "\ud83d", "\udc00x", "\u2028", "😀", "a" * 5000, "../..",
    "null", [], [[]], {},
    [None], [1, "a"], ["x"], {"a": None}, {"": 1}, {"role": "user"}, [{"role": "assistant", "content": "x"}],
    [{"from": "human", "value": "x"}], {"text": "x"}, {"name": "x"},
]  # fmt: skip
NASTY_BYTES: list[bytes] = [
    b"\x00", b"\xff", b"\xed\xa0\xbd", b"\\ud83d", b"\\u0000", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n", b"\r\n",
    b"\t",
    b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"-Infinity", b"1e999", b"9" * 5000,
    b"null", b"true",
    b"[" * 300, b"{\"a\":" * 300, b"PAR1", b"\x1f\x8b", b"0", b"-", b"#", b"&a ", b"*a", b"<<: ", b"!!int ",
    b"!x ", b"010", b"1:20", b"---\n", b"? ", b"|\n", b"%", b"@", b"`", b"\xc2\x85", b"\xe2\x80\xa8",
]  # fmt: skip


@st.composite
def mutated_bytes(draw: st.DrawFn, files: Sequence[bytes]) -> bytes:
    """One of ``files`` with up to four changes."""
    data = draw(st.sampled_from(files))
    for _ in range(draw(st.integers(1, 4))):
        data = draw(_change(data, files))
    return data


def _change(data: bytes, files: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    at = st.integers(0, len(data))
    nasty = st.sampled_from(NASTY_BYTES)

    def splice(where: int, other: bytes, start: int, length: int) -> bytes:
        return data[:where] + other[start : start + length] + data[where:]

    def swap(a: int, b: int, what: bytes) -> bytes:
        return data[: min(a, b)] + what + data[max(a, b) :]

    def flip(where: int, bit: int) -> bytes:
        if not data:
            return data
        where %= len(data)
        return data[:where] + bytes([data[where] ^ (1 << bit)]) + data[where + 1 :]

    short = st.integers(0, 12)
    return st.one_of(
        st.builds(flip, at, st.integers(0, 7)),
        st.builds(lambda where: data[:where], at),
        st.builds(lambda where, n: data[:where] + data[where + n :], at, short),
        st.builds(splice, at, st.sampled_from(files), st.integers(0, 400), st.integers(0, 80)),
        st.builds(lambda where, what: data[:where] + what + data[where:], at, nasty),
        st.builds(lambda where, n, what: swap(where, where + n, what), at, short, nasty),
    )


@st.composite
def mutated_value(draw: st.DrawFn, values: Sequence[Any], times: int = 3) -> Any:
    """One of ``values`` with up to ``times`` parts of another type, gone, or one too many."""
    value = copy.deepcopy(draw(st.sampled_from(values)))
    for _ in range(draw(st.integers(1, times))):
        places = list(_places(value))
        if not places:
            return draw(st.sampled_from(NASTY_VALUES))
        holder, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["retype", "retype", "retype", "drop", "add", "wrap"]))
        if what == "retype":
            holder[key] = copy.deepcopy(draw(st.sampled_from(NASTY_VALUES)))
        elif what == "drop":
            del holder[key]
        elif what == "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"x": holder[key]}]))
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(draw(st.sampled_from(NASTY_VALUES))))
        else:
            name = draw(st.sampled_from(["x", "", "\ud83d", "prompt", "content", "name"]))
            holder[name] = copy.deepcopy(draw(st.sampled_from(NASTY_VALUES)))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every part of a value, as what holds it and its key there."""
    if not isinstance(value, dict | list):
        return
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        yield from _places(item)


def as_json(value: Any) -> bytes:
    """JSON as Python writes it: NaN, and half a surrogate pair as an escape."""
    return json.dumps(value).encode()


class TooManySteps(Exception):
    """A reader that would take for ever."""


@contextlib.contextmanager
def steps(most: int = _STEPS) -> Iterator[None]:
    """Raises TooManySteps in the block once it has made so many calls. In slow tests: counting takes time."""
    left = most
    if not _COUNTED:
        yield
        return

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        del frame, argument
        left -= event in ("call", "c_call")
        if left < 0:
            sys.setprofile(None)
            raise TooManySteps

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)


def fuzzed(
    strategy: st.SearchStrategy[T], check: Callable[[Any, T], None], *, share: float = 1.0
) -> tuple[Any, Any]:
    """``(test, slow twin)``: ``check(tmp_path, input)`` over few and many inputs, the same on every machine.

    Args: ``share``: of a reader's inputs, where several tests have one each.
    """

    def made(most: int) -> Any:
        @settings(
            max_examples=most, derandomize=True, database=None, deadline=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(data=strategy)
        def test(tmp_path_factory: pytest.TempPathFactory, data: T) -> None:
            _COUNTED[:] = [True] * (most > FEW)
            check(_folder(tmp_path_factory), data)

        return test

    return made(round(share * FEW)), pytest.mark.slow(made(round(share * MANY)))


_COUNTED: list[bool] = []
_FOLDERS: list[Any] = []


def _folder(factory: pytest.TempPathFactory) -> Any:
    """One for all inputs: making a folder takes longer than reading a file."""
    if not _FOLDERS:
        _FOLDERS.append(factory.mktemp("fuzz"))
    return _FOLDERS[0]
