"""Puts rows in an order to train in, easiest first or last, and keeps the first of them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from data_pipelines.base import Dropped, Place, StageSettings
from data_pipelines.external_order import ranks_of, reordered
from data_pipelines.registry import stage
from data_pipelines.rows import SIDES, Row, RowKind, responses_of
from data_pipelines.stages.filter import margin_of, number_at
from prefopt.recipe.yaml_file import Document, KeyPath


@stage(
    "order",
    works="whole",
    reads={RowKind.PROMPTS, RowKind.GROUPS, RowKind.PAIRS, RowKind.SAMPLES},
    source="arXiv:2410.06508 (AlphaLLM-CPL: α·norm(Δr) + (1-α)·norm(Δp)); arXiv:2410.09362 (SeRA)",
)
class Order(StageSettings):
    """Sorts rows by one key or by a weighted sum of several; keeps the first share of them, if asked.

    A key is `margin` (score_chosen - score_rejected), `length_gap` (characters, chosen - rejected), `accuracy`
    (share of a group's responses that are right), `random`, `gap.NAME` (the sides' difference in what a
    `score` stage stored with `into: NAME`, e.g. a policy's prediction gap), or the dotted path of a column.
    A row without a key is dropped as `no_<key>`. Training shuffles each epoch unless its recipe says not to.
    """

    by: dict[str, float] = Field(default_factory=lambda: {"margin": 1.0})
    """Keys and their weights. AlphaLLM-CPL's balance rate α: `{margin: 0.5, gap.policy: 0.5}`. SeRA's ensemble
    over two rounds: `{gap.now: 0.7, gap.before: 0.3}` with `normalise: none`."""
    normalise: Literal["minmax", "zscore", "none"] = "minmax"
    """How keys are made comparable before they are added; nothing where there is one key."""
    descending: bool = True
    """Largest first. Of margins: the clearest pairs first. Which way a curriculum should go is not settled."""
    keep_frac: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep this share of the rows, the first in the order; the rest is dropped as `beyond_keep_frac`. SeRA
    (arXiv:2410.09362) keeps about 0.7 of the offline pairs."""
    right_above: float = 0.5
    """For `accuracy`: a response with a score above this is right."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        where = document.origin((*path, "by"))
        found = []
        if not self.by:
            found.append(f"{where}order.by: names no key; e.g. {{margin: 1}}")
        pairs_only = [k for k in self.by if k in ("margin", "length_gap") or k.startswith("gap.")]
        if pairs_only and reads is not RowKind.PAIRS:
            found.append(
                f"{where}order.by.{pairs_only[0]}: is of pairs, and the stage before gives {reads}"
            )
        if "accuracy" in self.by and reads is not RowKind.GROUPS:
            found.append(
                f"{where}order.by.accuracy: is of groups, and the stage before gives {reads}"
            )
        return found

    def run(self, place: Place) -> Iterator[Row | Dropped]:
        assert place.input is not None
        keys, missing = self._keys(place)
        num_kept = math.ceil(self.keep_frac * (~missing.any(axis=1)).sum())
        ranks = self._ranks(keys, missing)
        names = list(self.by)
        for index, row in enumerate(place.input.rows()):
            if missing[index].any():
                yield Dropped(f"no_{names[int(missing[index].argmax())]}", id=row["id"])
            elif ranks[index] >= num_kept:
                yield Dropped("beyond_keep_frac", id=row["id"])
        ranks[ranks >= num_kept] = -1
        yield from reordered(place.input.rows(), ranks, place.scratch)

    def _keys(self, place: Place) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(N, K) fp64 values, 8 bytes a row and key, and where there are none."""
        assert place.input is not None
        readers = [self._reader(name, place) for name in self.by]
        values = array("d")
        for row in place.input.rows():
            for reader in readers:
                value = reader(row)
                values.append(math.nan if value is None else value)
        keys = np.frombuffer(values, dtype=np.float64).reshape(-1, len(readers))
        return keys, np.isnan(keys)

    def _ranks(
        self, keys: np.ndarray[Any, Any], missing: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """(N,) int64; -1 for rows that lack a key."""
        sound = ~missing.any(axis=1)
        ranks = np.full(len(keys), -1, dtype=np.int64)
        if sound.any():
            total = self._normalised(keys[sound]) @ np.asarray(list(self.by.values()))
            ranks[sound] = ranks_of(total, descending=self.descending)
        return ranks

    def _normalised(self, keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if len(self.by) == 1 or self.normalise == "none":
            return keys
        if self.normalise == "minmax":
            low, spread = keys.min(axis=0), np.ptp(keys, axis=0)
        else:
            low, spread = keys.mean(axis=0), keys.std(axis=0)
        return (keys - low) / np.where(spread > 0, spread, 1.0)  # a constant key orders nothing

    def _reader(self, name: str, place: Place) -> Callable[[Row], float | None]:
        if name == "margin":
            return margin_of
        if name == "length_gap":
            return lambda row: float(len(row["chosen"]) - len(row["rejected"]))
        if name == "accuracy":
            return self._accuracy
        if name == "random":
            return lambda row: place.rng(row["id"]).random()
        if name.startswith("gap."):
            return lambda row: _gap(row, name.removeprefix("gap."))
        return lambda row: number_at(row, name)

    def _accuracy(self, row: Mapping[str, Any]) -> float | None:
        scores = [each["score"] for each in row["responses"] if each.get("score") is not None]
        return sum(s > self.right_above for s in scores) / len(scores) if scores else None


def _gap(row: Row, name: str) -> float | None:
    """The chosen side's value minus the rejected one's."""
    values = [number_at(each, name) for each in responses_of(row, RowKind.PAIRS)]
    found = dict(zip(SIDES, values, strict=True))
    if found["chosen"] is None or found["rejected"] is None:
        return None
    return found["chosen"] - found["rejected"]
