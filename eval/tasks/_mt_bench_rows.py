"""Ratings of MT-Bench: read in a judge's text, or stored in FastChat's judgment files; rows made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.base import Judgment, Row
from eval.sources import columns, require
from prefopt.data.readers import RawRow
from prefopt.errors import DataError

TURNS = ("first_turn", "second_turn")
LOWEST, HIGHEST = 1.0, 10.0
_FAILED = -1
"""What FastChat stores for an answer in which it read no rating."""
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


@dataclass(frozen=True)
class Rated:
    """A judge's rating of one turn."""

    rating: float | None
    unrated: str | None = None
    """Why there is no rating."""
    problem: str | None = None
    """Of the answer that was rated."""
    disagrees: bool = False
    """The stored score is not what is read in the judge's text."""


def read_rating(text: str) -> float | None:
    """The first number in double brackets, else the first in single ones; None if there is neither.

    A number outside 1 to 10 is a rating, too, as published; results count them.
    """
    found = next((match for each in _RATINGS if (match := each.search(text))), None)
    return None if found is None else float(found.group(1))


def rated(judgment: Judgment, answer_problem: str | None) -> Rated:
    rating = read_rating(judgment.text)
    refused = "judge_refused" if judgment.refused else "no_rating"
    return Rated(rating, refused if rating is None else None, answer_problem)


def stored_identity(raw: RawRow) -> tuple[str, str, str]:
    """Model, question and turn of a stored judgment."""
    turn = require(raw, "turn")
    if turn not in (1, 2):
        raise DataError(f"{raw.where}: turn = {turn!r}: must be 1 or 2")
    return str(raw.data.get("model") or ""), str(require(raw, "question_id")), TURNS[turn - 1]


def judged_twice(model: str, pairs: Sequence[tuple[RawRow, RawRow]]) -> DataError:
    """What is wrong with a model whose turns have two judgments: ``(first, second)`` rows of each."""
    (first, second), *_ = pairs
    _, key, turn = stored_identity(second)
    places = ", ".join(f"{one.where} and {other.where}" for one, other in pairs[:5])
    places += f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
    judges = [str(raw.data.get("judge")) for raw in (first, second)]
    by = (
        f"by judge {judges[0]}"
        if judges[0] == judges[1]
        else f"by the judges {' and '.join(judges)}"
    )
    return DataError(
        f"{second.where}: a second judgment of {model or 'the model'} on question {key}, {turn}; the first is at "
        f"{first.where} ({by}). {len(pairs)} turns have two: {places}. Keep one of each"
    )


def stored_rating(raw: RawRow) -> Rated:
    """The stored score, which is what published numbers are made of; -1 and null are none."""
    if "score" not in raw.data:
        raise DataError(
            f"{raw.where}: column 'score' is missing: not a single-answer judgment; its columns: {columns(raw)}"
        )
    score, text = raw.data["score"], raw.data.get("judgment")
    if isinstance(score, bool) or not isinstance(score, int | float | None):
        raise DataError(f"{raw.where}: score = {score!r}: must be a number")
    rating = None if score is None or score == _FAILED else float(score)
    unrated = "null_score" if score is None else "no_rating" if rating is None else None
    odd = isinstance(text, str) and read_rating(text) != rating
    return Rated(rating, unrated, disagrees=odd)


def rating_row(key: str, category: str | None, turns: Mapping[str, Rated]) -> Row:
    """One question: ``average`` of its ratings first, then each turn's."""
    ratings = [each.rating for each in turns.values() if each.rating is not None]
    values = {"average": sum(ratings) / len(ratings) if ratings else None}
    values |= {turn: each.rating for turn, each in turns.items()}
    details: dict[str, Any] = {
        "turns": list(turns),
        "unrated": {turn: each.unrated for turn, each in turns.items() if each.unrated},
    }
    if category is not None:
        details["category"] = category
    if odd := sum(each.disagrees for each in turns.values()):
        details["disagreements"] = odd
    problems = [each.problem or each.unrated for each in turns.values()]
    return Row(key, values, details, next((each for each in problems if each), None))


def clusters(rows: Sequence[Row], turns: Sequence[str]) -> list[tuple[float, float]]:
    """``(sum, number)`` of the ratings of each question that has one, ordered by question."""
    found = []
    for row in sorted(rows, key=lambda row: row.key):
        ratings = [value for turn in turns if (value := row.values.get(turn)) is not None]
        if ratings:
            found.append((sum(ratings), float(len(ratings))))
    return found
