"""From scored groups to pairs, by the credit rules that online training uses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from data_pipelines.base import Dropped, Place, Result, RowByRow, StageSettings
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, side_columns, user_fields
from prefopt.credit.base import GroupScores
from prefopt.recipe.entries import Entry, bind
from prefopt.recipe.registry import BoundCredit, Need
from prefopt.recipe.yaml_file import Document, KeyPath


@stage(
    "pair",
    works="map",
    reads={RowKind.GROUPS},
    gives=RowKind.PAIRS,
    source="the credit rules of online training; SimPO v0.2 (arXiv:2405.14734): best against worst",
)
class Pair(StageSettings):
    """Turns each scored group into pairs by a credit rule; `prefopt credits` lists them.

    A group without a pair is dropped under the rule's own reason (`tie`, `duplicate`, `all_right`, …). A
    response without a score is left out of its group and noted in the pair's `num_unscored`.
    """

    rule: Annotated[BoundCredit, Entry("credit")] = Field(
        default_factory=lambda: bind("credit", {"name": "best_worst"})
    )
    """`name` and keys of the rule, e.g. `{name: best_worst, min_margin: 0.5}`."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        at, spec = (*path, "rule"), self.rule.spec
        if Need.PAIRS not in spec.gives:
            gives = ", ".join(need.value for need in spec.gives) or "no labels"
            return [
                f"{document.origin(at)}rule.name = {spec.name!r}: gives {gives}, and `pair` needs a rule that "
                "gives pairs; `prefopt credits`"
            ]
        return []

    def code(self) -> tuple[Any, ...]:
        return (self.rule.fn,)

    def open(self, place: Place) -> RowByRow:
        def pair(row: Row) -> Result:
            responses = [each for each in row["responses"] if is_scored(each)]
            if len(responses) < 2:
                return Dropped(
                    "fewer_than_two_scored", f"{len(responses)} of {len(row['responses'])}"
                )
            offline = next((i for i, each in enumerate(responses) if each.get("offline")), None)
            scores = GroupScores(
                rewards=tuple(float(each["score"]) for each in responses),
                ids=stand_in_ids(responses),
                rng=place.rng(row["id"]),
                offline=offline,
            )
            labels = self.rule(scores)
            if labels.skipped is not None:
                return Dropped(labels.skipped)
            return pair_rows(row, responses, labels.pairs)

        return RowByRow(pair)


def pair_rows(
    row: Row, responses: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[int, int]]
) -> list[Row]:
    """One row a pair of ``(chosen, rejected)`` indices; the row's own columns travel with each."""
    unscored = len(row["responses"]) - len(responses)
    found = []
    for number, (chosen, rejected) in enumerate(pairs):
        id_ = row["id"] if len(pairs) == 1 else f"{row['id']}#{number}"
        pair = {"id": id_, "prompt": row["prompt"]}
        for side, index in (("chosen", chosen), ("rejected", rejected)):
            # token ids have done their work: what trains renders text with its own tokenizer
            response = {key: value for key, value in responses[index].items() if key != "ids"}
            pair |= side_columns(side, response)
        pair |= user_fields(row)
        found.append(pair | ({"num_unscored": unscored} if unscored else {}))
    return found


def stand_in_ids(responses: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, ...], ...]:
    """Ids for rules that ask which responses are equal and which is longer, where texts are all there is.

    Equal texts have equal ids; the length is that in tokens where every response has it, else in characters.
    """
    counted = all("tokens" in each for each in responses)
    first: dict[str, int] = {}
    found = []
    for index, each in enumerate(responses):
        number = first.setdefault(each["text"], index)
        length = int(each["tokens"]) if counted else len(each["text"])
        found.append((number,) * max(1, length))
    return tuple(found)


def is_scored(response: Mapping[str, Any]) -> bool:
    """Has it a finite score?"""
    score = response.get("score")
    return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
