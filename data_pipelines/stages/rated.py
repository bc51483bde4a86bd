"""Rated data as it was published: pairs, or all the scored responses to each prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from data_pipelines.base import Dropped, Place, StageSettings
from data_pipelines.reading import (
    SourceRow,
    count_source_rows,
    keep_problems,
    source_identity,
    source_rows,
)
from data_pipelines.registry import stage
from data_pipelines.rows import SIDES, Row, RowKind
from prefopt.data.readers import RawRow
from prefopt.data.rows import Refused, as_float, column, shown
from prefopt.errors import DataError
from prefopt.recipe.schema import Section, SourceSection
from prefopt.recipe.yaml_file import Document, KeyPath


class ResponseList(Section):
    """A column that holds a list of responses (UltraFeedback with all completions)."""

    column: str
    """The list's column."""
    text: str | None = "text"
    """Key of a response's text; null where the list holds texts."""
    score: str | None = None
    """Key of its score; a dot descends."""
    model: str | None = None
    """Key of the model's name."""


class ResponseColumns(Section):
    """One response of a row that has each in columns of its own."""

    text: str
    """Column of the text; a dot descends (`6b_finetuning.solution`)."""
    score: str | None = None
    """Column of the score; true and false are 1 and 0."""
    model: str | None = None
    """The model's name, as it is."""
    offline: bool = False
    """The data set's own answer, chosen by decree: what the rule `sopo` sets against the worst sample. A later
    `sample` adds to it, so one response is enough."""


@stage(
    "rated",
    works="whole",
    gives="either",
    source="UltraFeedback (arXiv:2310.01377), HH (arXiv:2204.05862) and every set in one of their shapes",
)
class Rated(StageSettings):
    """Reads pairs (`chosen`, `rejected`), or with `responses` all responses to a prompt.

    Rows that could never be trained on (an empty side, equal sides, sides of two dialogues, a side that does
    not end with the assistant) are dropped under the names `prefopt train` would reject them by.
    """

    sources: Annotated[tuple[SourceSection, ...], Field(strict=False, min_length=1)]
    """As a recipe's `data.train`: any format; `columns` names prompt, sides and scores."""
    responses: ResponseList | Annotated[tuple[ResponseColumns, ...], Field(strict=False)] | None = (
        None
    )
    """Where the responses are: `{column: completions, text: response, score: overall_score}`, or a list of
    `{text: COLUMN, score: COLUMN, model: NAME}`; one alone is a weighted sample, and needs a score. Leave out for
    pairs."""
    keep: tuple[str, ...] = Field(default=(), strict=False)
    """Columns that later stages read, e.g. `answer`; a dot descends."""

    @property
    def gives_kind(self) -> RowKind:
        """Pairs without `responses`, else groups."""
        return RowKind.PAIRS if self.responses is None else RowKind.GROUPS

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        found = keep_problems(self.keep, document, path)
        for number, section in enumerate(self.sources):
            at = (*path, "sources", number)
            if "weight" in section.model_fields_set:
                found.append(
                    f"{document.origin((*at, 'weight'))}rated.sources.{number}.weight: would be ignored: every "
                    "row is read once; weigh with `mix`, or in the recipe"
                )
            given = section.columns.model_fields_set & {
                "chosen",
                "rejected",
                "score_chosen",
                "score_rejected",
            }
            if self.responses is not None and given:
                name = sorted(given)[0]
                found.append(
                    f"{document.origin((*at, 'columns', name))}rated.sources.{number}.columns.{name}: would "
                    "be ignored: `responses` says where the responses are"
                )
        if isinstance(self.responses, tuple) and len(self.responses) < self._least:
            found.append(
                f"{document.origin((*path, 'responses'))}rated.responses: names fewer than two responses; "
                "one alone needs a score, or offline: true"
            )
        return found

    def basis(self) -> Mapping[str, Any]:
        return source_identity(self.sources)

    def num_rows_in(self, place: Place) -> int | None:
        del place
        return count_source_rows(self.sources)

    def run(self, place: Place) -> Iterator[Row | Dropped]:
        pairs = self.responses is None
        make = self._pair if pairs else self._group
        for row in source_rows(self.sources, pairs=pairs):
            if isinstance(row.found, Refused):
                yield Dropped(str(row.found.reason), row.found.detail, row.id)
            else:
                yield make(row)

    @property
    def _least(self) -> int:
        """Responses that a row needs: two to compare, one to weigh or for a later `sample` to add to."""
        found = self.responses if isinstance(self.responses, tuple) else ()
        alone = len(found) == 1 and found[0].score is not None
        return 1 if alone or any(each.offline for each in found) else 2

    def _pair(self, row: SourceRow) -> Row | Dropped:
        assert not isinstance(row.found, Refused)
        pair: Row = {"id": row.id, "prompt": row.found.prompt}
        for side, response, score in zip(SIDES, row.found.responses, row.found.scores, strict=True):
            if not isinstance(response, str) and set(response) - {"role", "content"}:
                extra = sorted(set(response) - {"role", "content"})
                return Dropped("not_plain_text", f"{side} has {', '.join(extra)}", row.id)
            pair[side] = response if isinstance(response, str) else response["content"]
            if score is not None:
                pair[f"score_{side}"] = score
        return pair | row.kept(self.keep)

    def _group(self, row: SourceRow) -> Row | Dropped:
        assert not isinstance(row.found, Refused)
        found = list(self._responses(row.raw))
        responses = [each for each in found if each["text"].strip()]
        if len(responses) < self._least:
            return Dropped("fewer_than_two_responses", f"{len(responses)} with text", row.id)
        group: Row = {"id": row.id, "prompt": row.found.prompt, "responses": responses}
        if len(responses) < len(found):
            group["num_empty"] = len(found) - len(responses)
        return group | row.kept(self.keep)

    def _responses(self, raw: RawRow) -> Iterator[dict[str, Any]]:
        if isinstance(self.responses, ResponseList):
            for number, item in enumerate(_items(raw, self.responses.column)):
                yield _from_list(raw, number, item, self.responses)
            return
        for each in self.responses or ():
            response = {"text": _text(raw, each.text)} | _score(raw, each.score)
            response |= {"model": each.model} if each.model is not None else {}
            yield response | ({"offline": True} if each.offline else {})


def _items(raw: RawRow, name: str) -> list[Any]:
    value = column(raw, name)
    if isinstance(value, list):
        return value
    raise DataError(
        f"{raw.where}: column {name!r} holds no list of responses but {type(value).__name__}"
    )


def _from_list(raw: RawRow, number: int, item: Any, keys: ResponseList) -> dict[str, Any]:
    if keys.text is None or not isinstance(item, dict):
        if isinstance(item, str) and keys.text is None:
            return {"text": item}
        raise DataError(
            f"{raw.where}: {keys.column}.{number} is {type(item).__name__}; with responses.text = {keys.text!r} "
            f"each response must be {'a text' if keys.text is None else 'an object'}"
        )
    inner = RawRow(f"{raw.where}, {keys.column}", number, item, filled_nulls=raw.filled_nulls)
    response = {"text": _text(inner, keys.text)} | _score(inner, keys.score)
    if keys.model is not None:
        response["model"] = str(column(inner, keys.model))
    return response


def _text(raw: RawRow, name: str) -> str:
    value = column(raw, name)
    if value is None or isinstance(value, str):
        return value or ""
    raise DataError(
        f"{raw.where}: column {name!r} holds {type(value).__name__}, and a response is text"
    )


def _score(raw: RawRow, name: str | None) -> dict[str, float]:
    """The score as a number, nothing where it is null. Raises: DataError for anything else."""
    if name is None:
        return {}
    value = column(raw, name)
    if value is None or value == "":
        return {}
    number = as_float(value)
    if not math.isfinite(number):
        raise DataError(
            f"{raw.where}: column {name!r} = {shown(value)}: a score must be a finite number"
        )
    return {"score": number}
