"""Checker functions and their test cases against each other: AutoIF's cross-validation. No code runs here.

What a model answers is read as JSON with ``func`` and ``cases``; the functions are run elsewhere
(`prefopt.signals.checkers`, in the sandbox), and what they said comes back as votes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from prefopt.signals.checkers import Vote
from prefopt.signals.markdown_code import sources
from prefopt.storage.json_text import half_surrogate

_BANNED = ("download", "requests")
"""Lines with these are taken out of a function: the published rule against functions that fetch things."""

Case: TypeAlias = tuple[str, bool]
"""A response, and whether it follows the instruction."""


@dataclass(frozen=True)
class Proposal:
    """One answer of the model: a function and the cases it came with."""

    source: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class CrossChecked:
    """Which cases and functions stand, as indices into what was asked."""

    cases: tuple[int, ...]
    accuracies: tuple[float, ...]
    """Of every function: the share of the kept cases that it gets right; 0 where no case was kept."""


def read_proposal(text: str) -> Proposal | str:
    """The function and cases in one answer, or the reason there are none.

    The JSON is what the last fence holds (one that says json before others), else what lies between the first
    and the last brace. Line breaks inside its strings are taken as they are. A case needs a text ``input`` and a
    true or false ``output``, as JSON or as a word (the published prompt asks for a string); others are left out.
    """
    braces = text[text.find("{") : text.rfind("}") + 1]
    bodies = [body for body in (*sources(text, "json")[-1:], braces) if body.strip()]
    if not bodies:
        return "no_json"
    found = next((found for body in bodies if (found := _json(body)) is not None), None)
    if found is None:
        return "broken_json"
    if half_surrogate(found) is not None:
        return "broken_json"
    if not isinstance(found, dict) or not isinstance(found.get("func"), str):
        return "no_func"
    cases = found.get("cases")
    read = [_case(item) for item in cases] if isinstance(cases, list) else []
    return Proposal(without_fetching(found["func"]), tuple(case for case in read if case))


def _json(body: str) -> Any:
    try:
        return json.loads(body.strip(), strict=False)
    except (ValueError, RecursionError):  # a model's answer may be anything
        return None


def _case(item: Any) -> Case | None:
    if not isinstance(item, dict) or not isinstance(item.get("input"), str):
        return None
    output = item.get("output")
    if isinstance(output, str):
        output = {"true": True, "false": False}.get(output.strip().lower())
    return (item["input"], output) if isinstance(output, bool) else None


def without_fetching(source: str) -> str:
    """A function without its lines that name downloads or the requests library, ends stripped."""
    kept = [line for line in source.strip().split("\n") if not any(w in line for w in _BANNED)]
    return "\n".join(kept).strip()


def cross_check(votes: Sequence[Sequence[Vote]], expected: Sequence[bool]) -> CrossChecked:
    """Functions and cases judged by each other.

    A case is kept if at least one function agrees with it. A function's accuracy is the share of the kept
    cases that it gets right; where it raised or ran too long it is wrong.

    Args:
        votes: of each function, one a case.
        expected: what each case says.

    Source: methods F1 (d) 3; QwenLM/AutoIF code/3_cross_validation.py.
    """
    kept = [
        number
        for number, output in enumerate(expected)
        if any(of_one[number] is output for of_one in votes)
    ]
    right = [sum(of_one[number] is expected[number] for number in kept) for of_one in votes]
    return CrossChecked(tuple(kept), tuple(count / len(kept) if kept else 0.0 for count in right))
