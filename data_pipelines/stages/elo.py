"""Ratings of the models out of their battles: Bradley-Terry by maximum likelihood, with bootstrap intervals."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import PositiveInt

from data_pipelines.base import Dropped, Place, StageSettings
from data_pipelines.battles import Battle, read_battles
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind
from eval.bradley_terry import bootstrap_weights, fit_newton, player_columns
from prefopt.errors import DataError

logger = logging.getLogger("prefopt.data")
_PERCENTILES = (2.5, 50.0, 97.5)


@stage(
    "elo",
    works="whole",
    reads={RowKind.GROUPS},
    source="Arena Learning (arXiv:2407.10627): Bradley-Terry MLE, 100 bootstraps, median, 2.5-97.5 %, one anchor",
)
class Elo(StageSettings):
    """Rates the models that met in `battle`. The rows pass through as they are.

    The ratings go into the stage's sealed record (`manifest/<id>/done.json`, key `report`) and from there into
    `manifest.json`: for each model the median over the bootstraps (`elo`), `low` and `high` (2.5 and 97.5 %), the
    maximum-likelihood rating of all battles (`mle`), and its wins, losses and ties. A difference of 400 is odds of
    10 to 1. Unreadable battles are counted and left out; a model that no chain of battles links to the anchor has
    no rating and is listed under `unrated`.

    A model that wins (or loses) every battle has no finite rating: its number says only how far fp64 sees.
    """

    anchor: str
    """Model whose rating is fixed (the paper's: Llama-2-70B-Chat)."""
    anchor_elo: float = 1000.0
    """Its rating."""
    resamples: PositiveInt = 100
    """Bootstrap draws of all battles with replacement."""

    def code(self) -> tuple[Any, ...]:
        return (fit_newton, Battle)

    def needs_fields(self) -> tuple[str, ...]:
        return ("battles",)

    def run(self, place: Place) -> Iterator[Row | Dropped]:
        assert place.input is not None
        results: Counter[tuple[str, str, float]] = Counter()
        unreadable = 0
        for row in place.input.rows():
            for battle in read_battles(row):
                if battle.points is None:
                    unreadable += 1
                else:
                    results[(battle.model_a, battle.model_b, battle.points)] += 1
            yield row
        report = rate_models(results, self.anchor, self.anchor_elo, self.resamples)
        place.report.update(report, unreadable=unreadable)
        logger.info("%s: %s", place.id, _line(report))


def rate_models(
    results: Mapping[tuple[str, str, float], int], anchor: str, anchor_elo: float, resamples: int
) -> dict[str, Any]:
    """Ratings of every model that a chain of battles links to the anchor; plain JSON.

    Args:
        results: number of battles by (model a, model b, points of a).
        anchor: the model whose rating is ``anchor_elo``.
        resamples: bootstrap draws of all battles.

    Raises: DataError if the anchor is in no battle with a result.
    """
    linked = _linked(results, anchor)
    if anchor not in {name for one, other, _ in results for name in (one, other)}:
        known = ", ".join(sorted(linked | _names(results)) or ["none"])
        raise DataError(
            f"elo.anchor = {anchor!r}: is in no battle with a result; the models there are: {known}"
        )
    table = _Table(
        sorted((key, count) for key, count in results.items() if key[0] in linked), anchor
    )
    exact = table.elos(table.weights, anchor_elo)
    drawn = np.array(
        [table.elos(weights, anchor_elo) for weights in bootstrap_weights(table.weights, resamples)]
    )  # (resamples, models)
    low, median, high = np.percentile(drawn, _PERCENTILES, axis=0)
    models = {
        name: {
            "elo": float(median[index]),
            "low": float(low[index]),
            "high": float(high[index]),
            "mle": float(exact[index]),
            **_tally(results, name),
        }
        for index, name in enumerate(table.names)
    }
    ordered = dict(sorted(models.items(), key=lambda item: -item[1]["elo"]))
    unrated = sorted(_names(results) - linked)
    return {"anchor": anchor, "resamples": resamples, "models": ordered, "unrated": unrated}


@dataclass(frozen=True)
class _Table:
    """Battles that are alike in one row each, as `eval.bradley_terry` takes them."""

    counted: list[tuple[tuple[str, str, float], int]]
    anchor: str

    @property
    def names(self) -> list[str]:
        return sorted(_names(dict(self.counted)))

    @property
    def weights(self) -> np.ndarray:
        return np.array([count for _, count in self.counted], dtype=np.int64)

    def elos(self, weights: np.ndarray, anchor_elo: float) -> np.ndarray:
        """(models,) ratings in the order of ``names``, the anchor's at ``anchor_elo``."""
        place = {name: index for index, name in enumerate(self.names)}
        first = np.array([place[one] for (one, _, _), _ in self.counted])
        second = np.array([place[other] for (_, other, _), _ in self.counted])
        points = np.array([points for (_, _, points), _ in self.counted])
        columns = player_columns(first, second, len(place))
        logits = fit_newton(columns, points, weights.astype(np.float64))
        elos = 400 / math.log(10) * logits
        return elos - elos[place[self.anchor]] + anchor_elo


def _names(results: Mapping[tuple[str, str, float], int]) -> set[str]:
    return {name for one, other, _ in results for name in (one, other)}


def _linked(results: Mapping[tuple[str, str, float], int], anchor: str) -> set[str]:
    """The models that a chain of battles links to the anchor, itself included."""
    linked, size = {anchor}, 0
    while len(linked) > size:
        size = len(linked)
        for one, other, _ in results:
            if one in linked or other in linked:
                linked |= {one, other}
    return linked


def _tally(results: Mapping[tuple[str, str, float], int], name: str) -> dict[str, int]:
    """Battles of one model by how they ended for it."""
    found: dict[str, int] = {"wins": 0, "losses": 0, "ties": 0}
    for (one, other, points), count in results.items():
        if name in (one, other):
            own = points if name == one else 1 - points
            found[{1.0: "wins", 0.0: "losses"}.get(own, "ties")] += count
    return found


def _line(report: Mapping[str, Any]) -> str:
    rated = (
        f"{name} {found['elo']:.0f} [{found['low']:.0f}, {found['high']:.0f}]"
        for name, found in report["models"].items()
    )
    return ", ".join(rated)
