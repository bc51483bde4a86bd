"""From scored responses to weighted samples: one row a response, with its reward and advantage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveInt

from data_pipelines.base import (
    Dropped,
    MapWorker,
    Needs,
    Place,
    Result,
    RowByRow,
    StageSettings,
    Tally,
)
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, asked_options, responses_of, user_fields
from data_pipelines.stages.filter import number_at
from data_pipelines.stages.pair import is_scored, stand_in_ids
from data_pipelines.value_rows import model_problems, quantiles, require_in_range, reward_of
from prefopt.credit.base import GroupScores
from prefopt.recipe.entries import Entry, bind
from prefopt.recipe.registry import BoundCredit, Need
from prefopt.recipe.schema import ModelSection, NoEffect, PathText
from prefopt.recipe.yaml_file import Document, KeyPath

if TYPE_CHECKING:
    from prefopt.values.saved import HeadRecord, ValueModel

NEGATIVE, ZERO = "negative_advantage", "zero_advantage"
_QUANTILES = {
    "min": 0.0, "p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0,
}  # fmt: skip
_OF_HEAD = ("model", "device", "batch_tokens")
"""Keys that only a head reads."""


@stage(
    "advantage",
    works="map",
    reads={RowKind.GROUPS, RowKind.PAIRS, RowKind.SAMPLES},
    gives=RowKind.SAMPLES,
    source="the credit rules of online training; A = R - V(x) as in A-LoL (arXiv:2305.14718)",
)
class Advantage(StageSettings):
    """Gives every scored response its advantage: by a credit rule, against a column, or by a value head.

    With `head` A = R - V(x), V(x) predicted from the reference's hidden states of the prompt (a `value` stage
    trains it); the row gets `value`, and R is normalised as it was for the head. Rewards outside the head's range
    are an error.

    The stage's record has the share of negative advantages and their quantiles, and the head's validation error.
    A row without a scored response is dropped as `unscored`, one that the rule has nothing to say of under the
    rule's reason, a prompt that the head cannot read as `prompt_too_long` or `template_refused`.
    """

    rule: Annotated[BoundCredit, Entry("credit")] = Field(
        default_factory=lambda: bind("credit", {"name": "group_mean"})
    )
    """`name` and keys of a rule that gives advantages; `prefopt credits`. Not used with `value` or `head`."""
    value: str | None = None
    """Column with the value V(x) of the prompt: the advantage is then score - V(x), as A-LoL takes it."""
    head: PathText | None = None
    """Folder of a value head (OUTPUT_DIR/value/head): the advantage is then R - V(x) of that head."""
    model: ModelSection | None = None
    """The policy that the head was trained on, where it lies now; another one is refused. Default: where it lay
    when the head was trained."""
    positive_only: bool = False
    """Leave out responses whose advantage is not above 0, as A-LoL trains (arXiv:2305.14718). They are dropped as
    `negative_advantage` or `zero_advantage`, one line each."""
    batch_tokens: PositiveInt = 16384
    """Most tokens of one forward of the reference, padding included; with `head`."""
    device: Annotated[str | None, NoEffect("rows")] = None
    """Torch device of the reference; default: CUDA where there is one, else the CPU. With `head`."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        chosen = [key for key in ("value", "head", "rule") if key in self.model_fields_set]
        if len(chosen) > 1:
            first, second = (f"{key} = {self.model_dump()[key]!r}" for key in chosen[:2])
            where = document.origin((*path, chosen[1]))
            return [
                f"{where}{chosen[1]}: would be ignored with {first}, or {first} with {second}; keep one"
            ]
        if self.head is not None:
            return model_problems(document, (*path, "model"), self.model, "advantage.model")
        found = [
            f"{document.origin((*path, key))}advantage.{key}: would be ignored without advantage.head; set it"
            for key in _OF_HEAD
            if key in self.model_fields_set
        ]
        if self.value is None:
            found += self._rule_problems(reads, document, (*path, "rule"))
        return found

    def _rule_problems(self, reads: RowKind | None, document: Document, at: KeyPath) -> list[str]:
        where = document.origin(at)
        found: list[str] = []
        if Need.ADVANTAGES not in self.rule.spec.gives:
            found.append(
                f"{where}rule.name = {self.rule.name!r}: gives no advantages; `prefopt credits`"
            )
        if reads is RowKind.SAMPLES:
            found.append(
                f"{where}advantage.rule: a rule compares the responses to one prompt, and samples have one each; "
                "set advantage.head, or advantage.value"
            )
        return found

    def needs(self) -> Needs:
        return Needs(self.head is not None, int(self.head is not None and self.device != "cpu"))

    def basis(self) -> Mapping[str, Any]:
        """Raises: ModelError for a head that is not there, or belongs to another model."""
        if self.head is None:
            return {}
        from prefopt.values.saved import require_reference

        record = self._head_record()
        section = self._section() or record.reference.section
        require_reference(Path(self.head), record, section)
        return {"head": record.content, "reference": record.reference.weights}

    def code(self) -> tuple[Any, ...]:
        if self.head is not None:
            from prefopt.values.features import FrozenReference
            from prefopt.values.heads import AttentionValueHead

            return (AttentionValueHead, FrozenReference, reward_of)
        return () if self.value is not None else (self.rule.fn,)

    def needs_fields(self) -> tuple[str, ...]:
        return () if self.value is None else (self.value,)

    def report(self, rows: Iterator[Row], tally: Tally) -> dict[str, Any]:
        """How many advantages are below 0 of all that were computed; quantiles of those that were kept."""
        advantages = [row["advantage"] for row in rows]
        left_out = {key: tally.dropped.get(key, 0) for key in (NEGATIVE, ZERO)}
        negative = left_out[NEGATIVE] + sum(each < 0 for each in advantages)
        zero = left_out[ZERO] + sum(each == 0 for each in advantages)
        total = len(advantages) + sum(left_out.values())
        found: dict[str, Any] = {"responses": total}
        if total:
            found |= {"negative_frac": negative / total, "zero_frac": zero / total}
            found["quantiles_of_kept"] = quantiles(_QUANTILES, advantages)
        head: dict[str, Any] = {}
        if self.head is not None:
            record = self._head_record()
            head = {f"validation_{key}": each for key, each in record.validation.items()}
            head = {"head": {"content": record.content, "kept_epoch": record.kept_epoch, **head}}
        return {"advantages": found, **head}

    def open(self, place: Place) -> MapWorker:
        """Raises: ModelError for a head or reference that cannot be loaded."""
        assert place.reads is not None
        if self.head is None:
            return RowByRow(lambda row: self._weigh(row, place))
        from prefopt.model.frozen import default_device
        from prefopt.values.saved import ValueModel

        device = str(default_device(self.device))
        model = ValueModel(
            Path(self.head), self._section(), device=device, batch_tokens=self.batch_tokens
        )
        return HeadWorker(self, place, model)

    def _head_record(self) -> HeadRecord:
        from prefopt.values.saved import read_head

        assert self.head is not None
        return read_head(Path(self.head))

    def _section(self) -> ModelSection | None:
        """The reference's section as the user gave it, a run replaced by its policy."""
        from eval.models import resolve_run

        return None if self.model is None else resolve_run(self.model)

    def _weigh(self, row: Row, place: Place) -> Result:
        responses = scored_responses(row, place)
        if not responses:
            return Dropped("unscored")
        advantages = self._advantages(row, responses, place)
        if isinstance(advantages, Dropped):
            return advantages
        rewards = [float(each["score"]) for each in responses]
        value = None if self.value is None else number_at(row, self.value)
        return self.sample_rows(row, responses, rewards, advantages, value)

    def _advantages(
        self, row: Row, responses: Sequence[Mapping[str, Any]], place: Place
    ) -> Sequence[float] | Dropped:
        rewards = tuple(float(each["score"]) for each in responses)
        if self.value is not None:
            value = number_at(row, self.value)
            return Dropped("no_value") if value is None else [reward - value for reward in rewards]
        scores = GroupScores(rewards, stand_in_ids(responses), place.rng(row["id"]))
        labels = self.rule(scores)
        return Dropped(labels.skipped) if labels.skipped is not None else labels.advantages

    def sample_rows(
        self,
        row: Row,
        responses: Sequence[Mapping[str, Any]],
        rewards: Sequence[float],
        advantages: Sequence[float],
        value: float | None,
    ) -> list[Row | Dropped]:
        """A sample a response; with `positive_only`, `Dropped` for those whose advantage is not above 0."""
        found: list[Row | Dropped] = []
        for number, response in enumerate(responses):
            # a sample stays itself; a group or pair becomes as many rows as it has responses
            id_ = row["id"] if "response" in row else f"{row['id']}#{number}"
            advantage = advantages[number]
            if self.positive_only and not advantage > 0:
                reason = NEGATIVE if advantage < 0 else ZERO
                found.append(Dropped(reason, f"{advantage:g}", id_))
                continue
            sample = {"id": id_, "prompt": row["prompt"], "response": response["text"]}
            sample |= {"reward": rewards[number]} | ({} if value is None else {"value": value})
            if "ended" in response:  # a cut response must not be trained to end: `columns.ended`
                sample["ended"] = response["ended"]
            found.append({**sample, "advantage": advantage, **user_fields(row)})
        return found


class HeadWorker:
    """A loaded reference with its head; see `Advantage`."""

    def __init__(self, settings: Advantage, place: Place, model: ValueModel) -> None:
        self.settings = settings
        self.place = place
        self.model: Any = model

    def process(self, rows: Sequence[Row]) -> Sequence[Result]:
        """Raises: DataError for rewards outside the head's range."""
        record, fit = self.model.record, self.model.record.settings
        responses = [scored_responses(row, self.place) for row in rows]
        rewards = [
            [reward_of(float(r["score"]), record.normalize_rewards) for r in each]
            for each in responses
        ]
        named = [(row["id"], r) for row, each in zip(rows, rewards, strict=True) for r in each]
        require_in_range(named, fit.max_value, self.place.id, record.normalize_rewards)
        scored = [index for index, each in enumerate(responses) if each]
        wanted = [rows[index] for index in scored]
        values = self.model.values([row["prompt"] for row in wanted], [*map(asked_options, wanted)])
        results: list[Result] = [Dropped("unscored") for _ in rows]
        for index, value in zip(scored, values, strict=True):
            results[index] = self._result(rows[index], responses[index], rewards[index], value)
        return results

    def close(self) -> None:
        self.model = None

    def _result(
        self, row: Row, responses: Sequence[Mapping[str, Any]], rewards: Sequence[float], value: Any
    ) -> Result:
        if not isinstance(value, float):
            return Dropped(str(value.reason), value.detail)
        advantages = [reward - value for reward in rewards]
        return self.settings.sample_rows(row, responses, rewards, advantages, value)


def scored_responses(row: Row, place: Place) -> list[dict[str, Any]]:
    """The responses of a row that have a score."""
    assert place.reads is not None
    return [each for each in responses_of(row, place.reads) if is_scored(each)]
