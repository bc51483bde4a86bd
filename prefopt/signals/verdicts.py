"""What judges say, read: verdicts, ratings, agreement of the two orders, scores of a round robin. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["A", "B", "C"]
"""The response shown first, the one shown second, or a tie."""

_BRACKETS = re.compile(r"\[\[\s*([ABC]|tie)\s*\]\]", re.IGNORECASE)
_CONDITION = re.compile(r"[\s:*–—-]*(?:=|(?:if|when|means|for)\b)", re.IGNORECASE)
"""What stands after a mark where the marks are explained: ``[[A]] if answer A is better``."""
_BETWEEN = re.compile(r"[\s,;/|\"'`*]*(?:(?:or|and)\b)?[\s\"'`*]*", re.IGNORECASE)
"""What stands between marks where they are only listed: ``one of [[A]], [[B]] or [[C]]``."""
_LLMBAR_SAID = re.compile(r"\bOutput \(([ab])\) is better\b", re.IGNORECASE)
_LLMBAR_ALONE = re.compile(r"^[ \t>#*\"'`]*Output \(([ab])\)", re.IGNORECASE | re.MULTILINE)
_EXAMPLE = re.compile(r"(?:for example|for instance|e\.\s?g\.|such as)[\s,:*\"'`]*$", re.IGNORECASE)
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_SWAPPED: dict[Verdict | None, Verdict | None] = {"A": "B", "B": "A", "C": "C", None: None}
_POINTS: dict[Verdict, float] = {"A": 1.0, "B": 0.0, "C": 0.5}


def parse_verdict(text: str) -> Verdict | None:
    """The last ``[[A]]``, ``[[B]]``, ``[[C]]`` or ``[[tie]]``, else LLMBar's ``Output (a)``; None if neither.

    Marks that quote the question are none: explained one by one (``[[A]] if answer A is better, [[B]] if …``), or
    listed (``one of [[A]], [[B]], [[C]]``).
    """
    marks = list(_BRACKETS.finditer(text))
    quoted = _explained(text, marks) | _listed(text, marks)
    said = [mark.group(1).upper() for number, mark in enumerate(marks) if number not in quoted]
    if marks:
        return _letter(said[-1]) if said else None
    return _llmbar_verdict(text)


def _letter(mark: str) -> Verdict:
    return "A" if mark == "A" else "B" if mark == "B" else "C"


def _explained(text: str, marks: Sequence[re.Match[str]]) -> set[int]:
    """Places of marks with a condition behind them, where two letters have one: one alone may be a verdict."""
    found = [number for number, mark in enumerate(marks) if _CONDITION.match(text, mark.end())]
    letters = {marks[number].group(1).upper() for number in found}
    return set(found) if len(letters) > 1 else set()


def _listed(text: str, marks: Sequence[re.Match[str]]) -> set[int]:
    """Places of marks of different letters with nothing but commas, slashes and an "or" between them."""
    found: set[int] = set()
    for number, (one, other) in enumerate(itertools.pairwise(marks)):
        between = _BETWEEN.fullmatch(text, one.end(), other.start())
        if between and one.group(1).upper() != other.group(1).upper():
            found |= {number, number + 1}
    return found


def _llmbar_verdict(text: str) -> Verdict | None:
    """As LLMBar's judges are asked: "Output (b) is better" (the last of it), else a line that begins "Output (b)".

    An output that is only mentioned is not chosen. Of several lines that begin with either, the first counts, as
    LLMBar's judges without reasoning name the output first and explain after.
    """
    if said := _LLMBAR_SAID.findall(text):
        return _letter(said[-1].upper())
    alone = _LLMBAR_ALONE.search(text)
    return None if alone is None else _letter(alone.group(1).upper())


def parse_rating(text: str, lowest: float = 1.0, highest: float = 10.0) -> float | None:
    """The last ``[[rating]]`` that is no example (``for example: [[5]]``); None for none, or one out of range."""
    found = [
        mark.group(1)
        for mark in _RATING.finditer(text)
        if not _EXAMPLE.search(text, 0, mark.start())
    ]
    if not found:
        return None
    rating = float(found[-1])
    return rating if lowest <= rating <= highest else None


def joint_outcome(first: Verdict | None, swapped: Verdict | None) -> float | None:
    """Points of the response shown first in ``first``: 1 it wins both orders, 0 loses both, else 0.5.

    Orders that disagree are a tie; None if either verdict is missing.
    """
    if first is None or swapped is None:
        return None
    return _POINTS[first] if first == _SWAPPED[swapped] else 0.5


@dataclass(frozen=True)
class OrderStats:
    """How a judge's verdicts depend on the order in which it saw the responses."""

    num_pairs: int = 0
    num_consistent: int = 0
    """Pairs with the same verdict in both orders; two answers without a verdict count as the same."""
    num_first: int = 0
    """Verdicts, of 2 · num_pairs, for the response shown first."""
    num_second: int = 0
    num_ties: int = 0
    num_missing: int = 0

    @property
    def consistency_rate(self) -> float:
        """Share of pairs, in [0, 1]; NaN of none."""
        return self.num_consistent / self.num_pairs if self.num_pairs else float("nan")

    @property
    def position_bias(self) -> float:
        """(first - second) / verdicts, in [-1, 1]; every response is first once, so 0 is unbiased."""
        verdicts = self.num_first + self.num_second + self.num_ties
        return (self.num_first - self.num_second) / verdicts if verdicts else float("nan")

    def __add__(self, other: OrderStats) -> OrderStats:
        return OrderStats(**{name: vars(self)[name] + vars(other)[name] for name in vars(self)})


def order_stats(pairs: Iterable[tuple[Verdict | None, Verdict | None]]) -> OrderStats:
    """Counts over pairs of verdicts: as asked, and with the responses swapped; letters as the judge wrote."""
    total = OrderStats()
    for first, swapped in pairs:
        both = (first, swapped)
        total += OrderStats(
            num_pairs=1,
            num_consistent=int(first == _SWAPPED[swapped]),
            num_first=both.count("A"),
            num_second=both.count("B"),
            num_ties=both.count("C"),
            num_missing=both.count(None),
        )
    return total


def win_fractions(
    num_responses: int, points: Mapping[tuple[int, int], float | None]
) -> list[float]:
    """Mean points of each response over its games of a round robin.

    Args:
        points: of the response ``i`` against ``j``, by ``(i, j)`` with i < j; ``j`` gets the rest of 1.

    Returns: a number in [0, 1] a response; NaN for one with a game that has no outcome.
    """
    totals = [0.0] * num_responses
    for (i, j), value in points.items():
        value = float("nan") if value is None else value
        totals[i] += value
        totals[j] += 1 - value
    return [total / (num_responses - 1) for total in totals]
