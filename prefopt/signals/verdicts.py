"""What judges say, read: verdicts, ratings, agreement of the two orders, scores of a round robin. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["A", "B", "C"]
"""The response shown first, the one shown second, or a tie."""

_BRACKETS = re.compile(r"\[\[\s*([ABC]|tie)\s*\]\]", re.IGNORECASE)
_LLMBAR = re.compile(r"\boutput \(([ab])\)", re.IGNORECASE)
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_SWAPPED: dict[Verdict | None, Verdict | None] = {"A": "B", "B": "A", "C": "C", None: None}
_POINTS: dict[Verdict, float] = {"A": 1.0, "B": 0.0, "C": 0.5}


def parse_verdict(text: str) -> Verdict | None:
    """The last ``[[A]]``, ``[[B]]``, ``[[C]]`` or ``[[tie]]``, else LLMBar's ``Output (a)``; None if neither."""
    found = _BRACKETS.findall(text) or _LLMBAR.findall(text)
    if not found:
        return None
    last = found[-1].upper()
    return "A" if last == "A" else "B" if last == "B" else "C"


def parse_rating(text: str, lowest: float = 1.0, highest: float = 10.0) -> float | None:
    """The last ``[[rating]]``; None if there is none, or it is out of range."""
    found = _RATING.findall(text)
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
