"""Inputs and expected outputs of programs, as public contest sets write them, and how outputs are compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefopt.errors import DataError

Compare = Literal["lines", "tokens"]
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_FUNCTIONAL = frozenset({"functional", "function_call", "call", "call_based"})
_STDIN = frozenset({"stdin", "stdin_stdout", "standard_input", "stdio"})


@dataclass(frozen=True)
class Case:
    """One input and what it must give: of a program that reads and prints, or of a function."""

    input: str = ""
    """What the program reads."""
    function: str | None = None
    """What is called instead, with ``arguments``."""
    arguments: tuple[Any, ...] = ()
    expected: Any = ""
    """What it prints, or the value of the call as JSON has it."""


def cases_together(value: Any, function: str | None) -> list[Case]:
    """Cases of one column: APPS and TACO, CodeContests, Codeforces, LiveCodeBench and what looks like them.

    Args:
        value: JSON text or what it says: ``{"inputs": […], "outputs": […], "fn_name": …}``, the same with
            ``input`` and ``output``, a list of ``{"input", "output", "testtype" or "type", "fn_name"}``, or that
            list under ``test_cases``.
        function: what is called, where the column itself names none.

    Raises: DataError saying what is wrong, without the place.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"is no JSON ({error}). LiveCodeBench's private tests are compressed pickles, which are not "
                "opened here: decode them into a column first"
            ) from error
    if isinstance(value, Mapping) and "test_cases" in value:
        function = value.get("fn_name") or function
        value = value["test_cases"]
    if isinstance(value, Mapping):
        for names in (("inputs", "outputs"), ("input", "output")):
            if set(names) <= set(value):
                function = value.get("fn_name") or function
                return cases_apart(value[names[0]], value[names[1]], function)
        raise DataError(
            f"has the keys {', '.join(map(str, value)) or 'none'}: must have inputs and outputs"
        )
    if not isinstance(value, list):
        raise DataError(f"holds {type(value).__name__}: must hold cases with inputs and outputs")
    if not value:
        raise DataError("holds no case: the row tests nothing. Drop it from data.prompts")
    return [_listed(number, each, function) for number, each in enumerate(value)]


def cases_apart(inputs: Any, outputs: Any, function: str | None) -> list[Case]:
    """Cases of two columns: a text each for one case, or lists of the same length.

    Raises: DataError saying what is wrong, without the place.
    """
    if not isinstance(inputs, list) and not isinstance(outputs, list):
        inputs, outputs = [inputs], [outputs]
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise DataError(
            "and its outputs are not both lists: give a list of each, or a text of each"
        )
    if len(inputs) != len(outputs):
        raise DataError(f"has {len(inputs)} inputs and {len(outputs)} outputs: must be as many")
    if not inputs:
        raise DataError("holds no case: the row tests nothing. Drop it from data.prompts")
    return [
        _case(number, given, expected, function)
        for number, (given, expected) in enumerate(zip(inputs, outputs, strict=True))
    ]


def _listed(number: int, each: Any, function: str | None) -> Case:
    if not isinstance(each, Mapping) or not {"input", "output"} <= set(each):
        raise DataError(
            f"case {number} must be an object with input and output, not {str(each)[:80]}"
        )
    kind = each.get("testtype") or each.get("type")
    function = each.get("fn_name") or function
    if kind in _STDIN:
        function = None
    elif kind in _FUNCTIONAL:
        if function is None:
            raise DataError(
                f"case {number} calls a function that nothing names: set `function` to the column that does "
                "(LiveCodeBench: metadata)"
            )
    elif kind is not None:
        raise DataError(f"case {number} has the type {kind!r}: must be stdin or functional")
    return _case(number, each["input"], each["output"], function)


def _case(number: int, given: Any, expected: Any, function: str | None) -> Case:
    if function is None:
        return Case(_text(number, "input", given), expected=_text(number, "output", expected))
    if isinstance(given, str):  # a JSON value a line
        try:
            arguments = tuple(json.loads(line) for line in given.split("\n") if line.strip())
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"case {number}: the arguments of {function} are no JSON, one value a line ({error})"
            ) from error
        return Case(function=function, arguments=arguments, expected=_value(expected))
    arguments = tuple(given) if isinstance(given, list) else (given,)
    return Case(function=function, arguments=arguments, expected=expected)


def _text(number: int, what: str, value: Any) -> str:
    """A text, a number, or a list of lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(line.removesuffix("\n") for line in value)
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return str(value)
    raise DataError(
        f"case {number}: its {what} is {type(value).__name__} ({str(value)[:60]}): a program reads and prints "
        "text. Where a function is called, name it (`function`, or fn_name in the column)"
    )


def _value(text: Any) -> Any:
    """What a JSON text says; a text that is none stands for itself."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return text


def function_name(value: Any) -> str:
    """The name of a function: a text, or ``func_name`` or ``fn_name`` of an object or its JSON text.

    Raises: DataError saying what is wrong, without the place.
    """
    found = _value(value)
    if isinstance(found, Mapping):
        found = found.get("func_name") or found.get("fn_name")
    if not isinstance(found, str) or not found.isidentifier():
        raise DataError(
            f"is told to call {str(value)[:60]!r}: `function` must be the column with a name"
        )
    return found


def spread(cases: Sequence[Case], budget: int | None) -> list[Case]:
    """At most so many cases, the first and the last among them: large ones tend to stand at the end."""
    if budget is None or len(cases) <= budget:
        return list(cases)
    if budget == 1:
        return [cases[0]]
    step = (len(cases) - 1) / (budget - 1)
    return [cases[round(number * step)] for number in range(budget)]


def same_text(printed: str, expected: str, compare: Compare, tolerance: float | None) -> bool:
    """Whether a checker of contests takes what was printed.

    Args:
        printed: by the program.
        expected: of the case.
        compare: ``lines``: line by line, without white space at their ends and without empty lines at the end.
            ``tokens``: what stands between white space.
        tolerance: two numbers are equal if they differ by no more, or by no more than that share of the expected.
    """
    if compare == "tokens":
        left, right = [printed.split()], [expected.split()]
        return _same_lines(left, right, tolerance)
    lines = [_lines(text) for text in (printed, expected)]
    if tolerance is None:
        return lines[0] == lines[1]
    left, right = ([line.split() for line in each] for each in lines)
    return _same_lines(left, right, tolerance)


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_lines(left: list[list[str]], right: list[list[str]], tolerance: float | None) -> bool:
    return [len(words) for words in left] == [len(words) for words in right] and all(
        one == other or (tolerance is not None and _close(one, other, tolerance))
        for words in zip(left, right, strict=True)
        for one, other in zip(*words, strict=True)
    )


def _close(one: str, other: str, tolerance: float) -> bool:
    if not _NUMBER.fullmatch(one) or not _NUMBER.fullmatch(other):
        return False
    return _near(float(one), float(other), tolerance)


def _near(found: float, expected: float, tolerance: float) -> bool:
    try:
        return abs(found - expected) <= tolerance * max(1.0, abs(expected))
    except OverflowError:  # an integer that no float can hold
        return False


def same_value(value: Any, expected: Any, tolerance: float | None) -> bool:
    """Whether a call gave what it must. APPS wraps values in lists of one: either is taken, as its grader does."""
    if _equal(value, expected, tolerance):
        return True
    return (
        isinstance(expected, list) and len(expected) == 1 and _equal(value, expected[0], tolerance)
    )


def _equal(value: Any, expected: Any, tolerance: float | None) -> bool:
    if isinstance(expected, list) and isinstance(value, list):
        return len(value) == len(expected) and all(
            _equal(one, other, tolerance) for one, other in zip(value, expected, strict=True)
        )
    if isinstance(expected, dict) and isinstance(value, dict):
        return value.keys() == expected.keys() and all(
            _equal(value[key], expected[key], tolerance) for key in expected
        )
    if value == expected:
        return True
    if tolerance is None or not isinstance(value, int | float):
        return False
    return isinstance(expected, int | float) and _near(value, expected, tolerance)
