"""Pairs of whole solutions by outcome and by annotated steps at once: SPARE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PositiveInt

from data_pipelines.base import Dropped, Place, Result, RowByRow, StageSettings
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind
from data_pipelines.stages.pair import is_scored, pair_rows
from data_pipelines.step_tree import CORRECT, INCORRECT, pareto_pairs, split_steps, step_scores
from prefopt.errors import DataError


@stage(
    "pareto",
    works="map",
    reads={RowKind.GROUPS},
    gives=RowKind.PAIRS,
    source="SPARE-ORPO (arXiv:2506.15498): strict Pareto dominance on (answer, mean of the step labels)",
)
class Pareto(StageSettings):
    """Pairs solutions of which one has the right answer, the other a wrong one, and more of its steps are correct.

    A solution is right if its `score` is above `right_above`. Its steps score 1 where an annotator said CORRECT,
    -1 otherwise, also where a label is missing; the last step scores as the answer does. A pair needs the chosen
    side to be better in both the answer and the mean of its steps, strictly. Equal solutions count once.

    `score_chosen` and `score_rejected` are the means; `info_*` has the `step_scores` and the `outcome`. Dropped:
    `no_labels`, `labels_do_not_fit` (their number is not that of the responses, or a label is for a step that is
    not there), `no_dominance`; a response without a score is left out.
    """

    labels: str = "step_labels"
    """Column with a list a response: a label a step, or SPARE's `{student_step: 1, label: CORRECT}`."""
    separator: str = Field(default="\n", min_length=1)
    """What ends a step, as the annotator counted them."""
    right_above: float = 0.5
    """A score above this is a right answer."""
    max_pairs: PositiveInt = 10
    """Most pairs of one prompt; of more, as many are drawn evenly."""
    reference: str | None = None
    """Column with a reference solution, which joins as right in every step: then a prompt that was never solved
    gives pairs, too."""

    def needs_fields(self) -> tuple[str, ...]:
        return (self.labels, *(() if self.reference is None else (self.reference,)))

    def code(self) -> tuple[Any, ...]:
        return (step_scores, pair_rows)

    def open(self, place: Place) -> RowByRow:
        def pair(row: Row) -> Result:
            solutions = self._solutions(row)
            if isinstance(solutions, Dropped):
                return solutions
            pairs = pareto_pairs([each.point for each in solutions])
            if not pairs:
                return Dropped("no_dominance")
            if len(pairs) > self.max_pairs:
                pairs = sorted(place.rng(row["id"]).sample(pairs, self.max_pairs))
            responses = [each.response() for each in solutions]
            row = {key: item for key, item in row.items() if key != self.labels}
            return pair_rows({**row, "responses": responses}, responses, pairs)

        return RowByRow(pair)

    def _solutions(self, row: Row) -> list[_Solution] | Dropped:
        """The distinct scored solutions of a row, the reference last."""
        labels = row.get(self.labels)
        if not isinstance(labels, list):
            return Dropped("no_labels")
        if len(labels) != len(row["responses"]):
            return Dropped(
                "labels_do_not_fit", f"{len(labels)} lists for {len(row['responses'])} responses"
            )
        found: dict[str, _Solution] = {}
        for response, given in zip(row["responses"], labels, strict=True):
            if not is_scored(response):
                continue
            right = response["score"] > self.right_above
            # an empty response is one step, whose score is the outcome
            steps = split_steps(response["text"], self.separator) or [""]
            scores = step_scores(given or [], len(steps), right=right)
            if scores is None:
                return Dropped("labels_do_not_fit", f"{len(steps)} steps, labels {given}")
            found.setdefault(response["text"], _Solution(response, right, scores))
        if self.reference is not None:
            reference = self._reference(row)
            found[reference.given["text"]] = reference
        return list(found.values())

    def _reference(self, row: Row) -> _Solution:
        text = row.get(self.reference or "")
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"row {row['id']}: pareto.reference = {self.reference!r}: that column must hold a solution as text"
            )
        steps = split_steps(text, self.separator)
        return _Solution({"text": text, "offline": True}, True, (CORRECT,) * len(steps))


@dataclass(frozen=True)
class _Solution:
    given: Mapping[str, Any]
    """The response, or the reference as one."""
    right: bool
    scores: Sequence[float]
    """A step each, 1 or -1."""

    @property
    def point(self) -> tuple[float, float]:
        """What a pair compares: the answer, and the mean of the steps."""
        return CORRECT if self.right else INCORRECT, sum(self.scores) / len(self.scores)

    def response(self) -> dict[str, Any]:
        known = {key: item for key, item in self.given.items() if key != "scores"}
        outcome, mean = self.point
        return {**known, "score": mean, "outcome": outcome, "step_scores": list(self.scores)}
