"""From scored responses to weighted samples: one row a response, with its reward and advantage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from data_pipelines.base import Dropped, Place, Result, RowByRow, StageSettings
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, responses_of, user_fields
from data_pipelines.stages.filter import number_at
from data_pipelines.stages.pair import is_scored, stand_in_ids
from prefopt.config.load import entry_problems
from prefopt.config.yaml_file import Document, KeyPath
from prefopt.credit.base import GroupScores
from prefopt.registry import Need, get_credit


@stage(
    "advantage",
    works="map",
    reads={RowKind.GROUPS, RowKind.PAIRS},
    gives=RowKind.SAMPLES,
    source="the credit rules of online training; a value per prompt as in A-LoL (arXiv:2305.14718)",
)
class Advantage(StageSettings):
    """Gives every scored response its advantage, by a credit rule or against a value of its prompt.

    A row without a scored response is dropped as `unscored`, one that the rule has nothing to say of under the
    rule's reason.
    """

    rule: dict[str, Any] = Field(default_factory=lambda: {"name": "group_mean"})
    """`name` and keys of a rule that gives advantages; `prefopt credits`. Not used with `value`."""
    value: str | None = None
    """Column with the value V(x) of the prompt: the advantage is then score - V(x), as A-LoL takes it."""
    positive_only: bool = False
    """Leave out responses whose advantage is not above 0, as A-LoL trains (arXiv:2305.14718)."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        at = (*path, "rule")
        if self.value is not None:
            if "rule" in self.model_fields_set:
                return [
                    f"{document.origin(at)}rule: would be ignored with value = {self.value!r}; keep one"
                ]
            return []
        found = entry_problems(document, at, self.rule, "credit")
        if not found and Need.ADVANTAGES not in get_credit(self.rule["name"]).gives:
            found.append(
                f"{document.origin(at)}rule.name = {self.rule['name']!r}: gives no advantages; `prefopt credits`"
            )
        return found

    def code(self) -> tuple[Any, ...]:
        return () if self.value is not None else (get_credit(self.rule["name"]).fn,)

    def needs_fields(self) -> tuple[str, ...]:
        return () if self.value is None else (self.value,)

    def open(self, place: Place) -> RowByRow:
        kind = place.reads
        assert kind is not None

        def weigh(row: Row) -> Result:
            responses = [each for each in responses_of(row, kind) if is_scored(each)]
            if not responses:
                return Dropped("unscored")
            advantages = self._advantages(row, responses, place)
            if isinstance(advantages, Dropped):
                return advantages
            found = _sample_rows(row, responses, advantages, positive_only=self.positive_only)
            return found or Dropped("no_positive_advantage")

        return RowByRow(weigh)

    def _advantages(
        self, row: Row, responses: Sequence[Mapping[str, Any]], place: Place
    ) -> Sequence[float] | Dropped:
        rewards = tuple(float(each["score"]) for each in responses)
        if self.value is not None:
            value = number_at(row, self.value)
            return Dropped("no_value") if value is None else [reward - value for reward in rewards]
        keys = {key: value for key, value in self.rule.items() if key != "name"}
        scores = GroupScores(rewards, stand_in_ids(responses), place.rng(row["id"]))
        labels = get_credit(self.rule["name"]).fn(scores, **keys)
        return Dropped(labels.skipped) if labels.skipped is not None else labels.advantages


def _sample_rows(
    row: Row,
    responses: Sequence[Mapping[str, Any]],
    advantages: Sequence[float],
    *,
    positive_only: bool,
) -> list[Row]:
    found = []
    for number, (response, advantage) in enumerate(zip(responses, advantages, strict=True)):
        if positive_only and not advantage > 0:
            continue
        sample = {
            "id": f"{row['id']}#{number}",
            "prompt": row["prompt"],
            "response": response["text"],
        }
        sample |= {"reward": float(response["score"]), "advantage": advantage}
        found.append(sample | user_fields(row))
    return found
