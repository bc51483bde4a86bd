"""Drops groups and pairs by what is known of them; every rule is off until it is set, and counted by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from data_pipelines.base import Dropped, Place, Result, RowByRow, StageSettings
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, prompt_text, responses_of
from prefopt.data.rows import shown
from prefopt.errors import DataError
from prefopt.recipe.schema import Fraction, NonNegativeFloat
from prefopt.recipe.yaml_file import Document, KeyPath

_Band = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
_PAIR_KEYS = (
    "drop_ties", "drop_negative_margins", "min_margin", "max_margin", "max_length_ratio", "max_length_gap",
    "drop_duplicate_sides",
)  # fmt: skip
_GROUP_KEYS = ("accuracy_band", "min_responses", "drop_all_equal")


@stage(
    "filter",
    works="map",
    reads={RowKind.PROMPTS, RowKind.GROUPS, RowKind.PAIRS},
    source="margins and ties: UltraFeedback practice; accuracy band: arXiv:2505.13261",
)
class Filter(StageSettings):
    """Drops rows by margin, ties, lengths, equal sides, measured difficulty. Nothing is dropped unless asked.

    Of several reasons the first in the order of these keys is counted.
    """

    drop_duplicate_sides: bool = False
    """Pairs: drop those whose sides are the same text but for white space at the ends."""
    drop_ties: bool = False
    """Pairs: drop those with equal scores."""
    drop_negative_margins: bool = False
    """Pairs: drop those whose chosen side scores lower than the rejected one."""
    min_margin: NonNegativeFloat | None = None
    """Pairs: least score_chosen - score_rejected."""
    max_margin: NonNegativeFloat | None = None
    """Pairs: largest margin: what is too easy teaches nothing, or the score is broken."""
    max_length_gap: PositiveInt | None = None
    """Pairs: most characters that the sides may differ by."""
    max_length_ratio: Annotated[float, Field(gt=1)] | None = None
    """Pairs: how many times as long, in characters, the longer side may be."""
    accuracy_band: _Band | None = None
    """Groups: keep a prompt whose share of right responses lies in [low, high], ends included: neither solved
    nor hopeless. arXiv:2505.13261 keeps [0.084, 0.87]."""
    right_above: float = 0.5
    """Groups: a response with a score above this is right."""
    min_responses: PositiveInt | None = None
    """Groups: least responses."""
    drop_all_equal: bool = False
    """Groups: drop those whose responses are all the same text (SimPO v0.2's post-processing)."""
    max_unended_frac: Fraction | None = None
    """Groups and pairs: largest share of responses that were cut by the length limit (`ended: false`)."""
    min_chars: PositiveInt | None = None
    """Groups and pairs: least characters of every response."""
    max_chars: PositiveInt | None = None
    """Groups and pairs: most characters of every response."""
    min_prompt_chars: PositiveInt | None = None
    """Least characters of the prompt."""
    max_prompt_chars: PositiveInt | None = None
    """Most characters of the prompt."""
    where: dict[str, Annotated[tuple[float | None, float | None], Field(strict=False)]] = Field(
        default_factory=dict
    )
    """Columns with the range that their numbers must lie in, ends included, null for no bound:
    `{quality: [8, null], info_chosen.scores.judge: [null, 9]}`."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        where = document.origin(path)
        wrong = {
            RowKind.PAIRS: _GROUP_KEYS,
            RowKind.GROUPS: _PAIR_KEYS,
            RowKind.PROMPTS: (
                *_GROUP_KEYS,
                *_PAIR_KEYS,
                "max_unended_frac",
                "min_chars",
                "max_chars",
            ),
        }
        found = [
            f"{document.origin((*path, key))}filter.{key}: would be ignored: the stage before gives {reads}; "
            "leave it out, or filter elsewhere"
            for key in wrong.get(reads, ())  # type: ignore[arg-type]
            if key in self.model_fields_set
        ]
        if not self.model_fields_set - {"right_above"}:
            found.append(
                f"{where}filter: no rule is set, so nothing would be dropped; `prefopt data stages filter`"
            )
        if self.accuracy_band is not None and self.accuracy_band[0] > self.accuracy_band[1]:
            found.append(
                f"{where}filter.accuracy_band = {list(self.accuracy_band)}: must be [low, high]"
            )
        return found

    def open(self, place: Place) -> RowByRow:
        kind = place.reads
        assert kind is not None

        def check(row: Row) -> Result:
            return next(self._reasons(row, kind), None) or row

        return RowByRow(check)

    def needs_fields(self) -> tuple[str, ...]:
        own = ("info_chosen", "info_rejected", "score_chosen", "score_rejected")
        return tuple(name for name in self.where if name.split(".")[0] not in own)

    def _reasons(self, row: Row, kind: RowKind) -> Iterator[Dropped]:
        if kind is RowKind.PAIRS:
            yield from self._pair_reasons(row)
        if kind is RowKind.GROUPS:
            yield from self._group_reasons(row)
        if kind in (RowKind.GROUPS, RowKind.PAIRS):
            yield from self._response_reasons(responses_of(row, kind))
        size = len(prompt_text(row))
        yield from _outside("prompt_chars", size, self.min_prompt_chars, self.max_prompt_chars)
        for name, (low, high) in self.where.items():
            value = number_at(row, name)
            if value is None:
                yield Dropped(f"no_{name}")
            else:
                yield from _outside(name, value, low, high)

    def _pair_reasons(self, row: Row) -> Iterator[Dropped]:
        chosen, rejected = row["chosen"], row["rejected"]
        if self.drop_duplicate_sides and chosen.strip() == rejected.strip():
            yield Dropped("duplicate_sides")
        if self._reads_margins:
            yield from self._margin_reasons(row)
        longer, shorter = max(len(chosen), len(rejected)), min(len(chosen), len(rejected))
        if self.max_length_gap is not None and longer - shorter > self.max_length_gap:
            yield Dropped("length_gap", f"{longer - shorter} characters")
        if self.max_length_ratio is not None and longer > self.max_length_ratio * shorter:
            yield Dropped("length_ratio", f"{longer} to {shorter} characters")

    @property
    def _reads_margins(self) -> bool:
        bounds = self.min_margin is not None or self.max_margin is not None
        return self.drop_ties or self.drop_negative_margins or bounds

    def _margin_reasons(self, row: Row) -> Iterator[Dropped]:
        margin = margin_of(row)
        if margin is None:
            yield Dropped("no_scores")
            return
        if self.drop_ties and margin == 0:
            yield Dropped("tie")
        if self.drop_negative_margins and margin < 0:
            yield Dropped("negative_margin", f"{margin:g}")
        yield from _outside("margin", margin, self.min_margin, self.max_margin)

    def _group_reasons(self, row: Row) -> Iterator[Dropped]:
        responses = row["responses"]
        if self.min_responses is not None and len(responses) < self.min_responses:
            yield Dropped("too_few_responses", f"{len(responses)}")
        if self.drop_all_equal and len({each["text"] for each in responses}) <= 1:
            yield Dropped("all_equal")
        if self.accuracy_band is None:
            return
        scores = [each["score"] for each in responses if each.get("score") is not None]
        if not scores:
            yield Dropped("no_scores")
            return
        accuracy = sum(score > self.right_above for score in scores) / len(scores)
        low, high = self.accuracy_band
        if accuracy < low:
            yield Dropped("too_hard", f"{accuracy:.3g} right")
        if accuracy > high:
            yield Dropped("too_easy", f"{accuracy:.3g} right")

    def _response_reasons(self, responses: Sequence[Mapping[str, Any]]) -> Iterator[Dropped]:
        if self.max_unended_frac is not None:
            unended = sum(each.get("ended") is False for each in responses) / max(1, len(responses))
            if unended > self.max_unended_frac:
                yield Dropped("unended", f"{unended:.3g} of the responses")
        for each in responses:
            yield from _outside("chars", len(each["text"]), self.min_chars, self.max_chars)


def margin_of(row: Mapping[str, Any]) -> float | None:
    """score_chosen - score_rejected; None where one is missing."""
    chosen, rejected = row.get("score_chosen"), row.get("score_rejected")
    return None if chosen is None or rejected is None else chosen - rejected


def number_at(row: Mapping[str, Any], path: str) -> float | None:
    """The number in a column, dots descending; None where there is none.

    Raises: DataError for something that is no number.
    """
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"row {row.get('id')}: column {path!r} = {shown(value)}: must be a number")
    return value


def _outside(name: str, value: float, low: float | None, high: float | None) -> Iterator[Dropped]:
    if low is not None and value < low:
        yield Dropped(f"{name}_below", f"{value:g}")
    if high is not None and value > high:
        yield Dropped(f"{name}_above", f"{value:g}")
