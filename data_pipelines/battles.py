"""Battles between models' answers, as rows hold them: what a judge gave both sides in both orders. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from prefopt.errors import DataError

ORDERS_AGREE = "orders_agree"
"""Column of a pair that was decided in two games: does each order alone give the same winner?"""

Ratings: TypeAlias = tuple[float, float]
"""Of answer a and answer b, whatever the order in which the judge saw them."""

_RATED = re.compile(r"\[\[\s*([AB])\s*:\s*(\d+(?:\.\d+)?)\s*\]\]", re.IGNORECASE)
_LOWEST, _HIGHEST = 1.0, 10.0


@dataclass(frozen=True)
class Battle:
    """Two answers to one prompt, by two models."""

    a: int
    """Index of the first among the row's responses."""
    b: int
    model_a: str
    model_b: str
    ratings: tuple[Ratings, ...]
    """One a game: with a shown first, with b shown first. Empty for equal texts, which nobody is asked about, and
    where an answer of the judge could not be read."""
    unreadable: bool = False
    """A game has no ratings: the battle has no result."""

    @property
    def means(self) -> Ratings:
        """Mean rating of a and of b over the games; 0, 0 without games."""
        count = max(1, len(self.ratings))
        return sum(a for a, _ in self.ratings) / count, sum(b for _, b in self.ratings) / count

    @property
    def gap(self) -> float:
        """Mean rating of a less that of b."""
        mean_a, mean_b = self.means
        return mean_a - mean_b

    @property
    def orders_agree(self) -> bool | None:
        """Do both games have the winner of their mean? None unless there were two."""
        if len(self.ratings) != 2:
            return None
        return all((a - b) * self.gap > 0 for a, b in self.ratings)

    @property
    def points(self) -> float | None:
        """Of a: 1 for the higher mean, 0 for the lower, 0.5 for equal ones; None where unreadable."""
        if self.unreadable:
            return None
        return 0.5 if self.gap == 0 else float(self.gap > 0)

    def record(self) -> dict[str, Any]:
        """As a row's column `battles` has it."""
        return {
            "a": self.a,
            "b": self.b,
            "model_a": self.model_a,
            "model_b": self.model_b,
            "ratings": [list(each) for each in self.ratings],
            "points": self.points,
        }


def read_battles(row: Mapping[str, Any]) -> list[Battle]:
    """The battles of a row. Raises: DataError if `battle` has not been there."""
    records = row.get("battles")
    if not isinstance(records, list):
        raise DataError(
            f"row {row.get('id')}: has no column 'battles'; the stage `battle` writes it and comes before this one"
        )
    return [_read(record) for record in records]


def _read(record: Mapping[str, Any]) -> Battle:
    ratings = tuple((float(a), float(b)) for a, b in record["ratings"])
    unreadable = record.get("points") is None
    names = (record["model_a"], record["model_b"])
    return Battle(record["a"], record["b"], *names, ratings, unreadable)


def matches(models: Sequence[str], target: str | None) -> Iterator[tuple[int, int]]:
    """Which responses meet: every two of different models, or with ``target`` those of it against the others.

    The target is the first of its matches; else the response that comes first in the row is.
    """
    for i, one in enumerate(models):
        for j, other in enumerate(models):
            if one == other:
                continue
            if (one == target) if target is not None else i < j:
                yield i, j


def parse_ratings(text: str) -> Ratings | None:
    """The last ``[[A: n]]`` and the last ``[[B: n]]``; None unless both are there and from 1 to 10."""
    found = {side.upper(): float(rating) for side, rating in _RATED.findall(text)}
    if found.keys() != {"A", "B"}:
        return None
    both = found["A"], found["B"]
    return both if all(_LOWEST <= each <= _HIGHEST for each in both) else None
