"""AutoIF's second half: checked instructions meet queries, and verified responses become pairs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt

from data_pipelines.base import Dropped, Place, Result, RowByRow, StageSettings
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, prompt_text
from data_pipelines.stages.pair import is_scored, pair_rows
from data_pipelines.templates import read_template, template_basis, with_prompt_text
from prefopt.data.rows import column
from prefopt.data.sources import open_source, sound_rows
from prefopt.errors import DataError
from prefopt.recipe.schema import Fraction, PathText, SourceSection
from prefopt.recipe.yaml_file import Document, KeyPath
from prefopt.signals.judge import fill

CONSTRAIN_TEMPLATE = """\
Answer the request below, and follow the instruction to the letter.

Instruction: {instruction}

Request: {query}"""


@stage(
    "constrain",
    works="map",
    reads={RowKind.PROMPTS},
    gives=RowKind.PROMPTS,
    source="AutoIF (arXiv:2406.13542): 16 random ShareGPT queries per instruction",
)
class Constrain(StageSettings):
    """Puts each instruction together with random queries: one prompt a query.

    The queries of one instruction are distinct. The row gets the columns `instruction` and `query`; its others,
    the checkers among them, travel along. All queries are held in memory.
    """

    queries: PathText
    """A file of queries (json, jsonl, parquet, csv; .gz too), a directory or glob of them, or a hub data set."""
    query: str = "prompt"
    """Column with the query: text, or messages, of which the first user message is taken."""
    per_instruction: PositiveInt = 16
    """Queries drawn for each instruction, without replacement."""
    min_chars: NonNegativeInt = 21
    """Shortest query; the released code takes those longer than 20 characters and shorter than 300."""
    max_chars: PositiveInt = 299
    """Longest query."""
    template: PathText | None = None
    """A text file in place of our own; holds `{instruction}` and `{query}`."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        if self.min_chars <= self.max_chars:
            return []
        where = document.origin((*path, "min_chars"))
        return [
            f"{where}constrain.min_chars = {self.min_chars}: is above max_chars = {self.max_chars}, so no query "
            "is left"
        ]

    def basis(self) -> Mapping[str, Any]:
        queries = open_source(SourceSection(path=self.queries)).identity()
        return {"queries": queries, **template_basis(self._template())}

    def gives_fields(self) -> tuple[str, ...]:
        return ("instruction", "query")

    def _template(self) -> str:
        needed = ("{instruction}", "{query}")
        return read_template(self.template, CONSTRAIN_TEMPLATE, needed, "constrain.template")

    def open(self, place: Place) -> RowByRow:
        template, queries = self._template(), self._queries()

        def constrain(row: Row) -> Result:
            instruction = str(row.get("instruction") or prompt_text(row)).strip()
            drawn = place.rng(row["id"]).sample(queries, self.per_instruction)
            found = []
            for number, query in enumerate(drawn):
                text = fill(template, {"instruction": instruction, "query": query})
                asked = with_prompt_text({**row, "id": f"{row['id']}#{number}"}, text)
                found.append({**asked, "instruction": instruction, "query": query})
            return found

        return RowByRow(constrain)

    def _queries(self) -> list[str]:
        """Distinct queries of the right length, in file order. Raises: DataError if there are too few."""
        rows = sound_rows(open_source(SourceSection(path=self.queries)).rows())
        texts = (_query(column(row, self.query)) for row in rows)
        fits = (text for text in texts if self.min_chars <= len(text) <= self.max_chars)
        found = list(dict.fromkeys(fits))
        if len(found) < self.per_instruction:
            raise DataError(
                f"constrain.queries = {self.queries!r}: has {len(found)} distinct queries of {self.min_chars} to "
                f"{self.max_chars} characters in the column {self.query!r}, and per_instruction = "
                f"{self.per_instruction} asks for more. Lower it, widen the lengths, or take a larger file"
            )
        return found


@stage(
    "accepted_rejected",
    works="map",
    reads={RowKind.GROUPS},
    gives=RowKind.PAIRS,
    source="AutoIF (arXiv:2406.13542): accuracy >= 0.5 against accuracy 0, up to 2 of each",
)
class AcceptedRejected(StageSettings):
    """Pairs responses that checkers accept with responses that none accepts; what lies between is in no pair.

    Up to `per_side` of each are drawn, and every one of the accepted meets every one of the rejected. Equal texts
    count once. Dropped: `none_accepted`, `none_rejected`; a response without a score is left out.
    """

    accept_at: Fraction = 0.5
    """Least score of a chosen response."""
    reject_at: Fraction = 0.0
    """Highest score of a rejected response."""
    per_side: Annotated[int, Field(ge=1)] = 2
    """Most responses of each side: 2 give up to 4 pairs."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        if self.reject_at < self.accept_at:
            return []
        where = document.origin((*path, "reject_at"))
        return [
            f"{where}accepted_rejected.reject_at = {self.reject_at:g}: must be below accept_at = "
            f"{self.accept_at:g}, or a response may be on both sides"
        ]

    def code(self) -> tuple[Any, ...]:
        return (pair_rows,)

    def open(self, place: Place) -> RowByRow:
        def pair(row: Row) -> Result:
            responses = [each for each in row["responses"] if is_scored(each)]
            accepted = _distinct(responses, self.accept_at, math.inf)
            rejected = _distinct(responses, -math.inf, self.reject_at)
            if not accepted:
                return Dropped("none_accepted")
            if not rejected:
                return Dropped("none_rejected")
            rng = place.rng(row["id"])
            chosen, worse = (
                sorted(rng.sample(side, min(self.per_side, len(side))))
                for side in (accepted, rejected)
            )
            return pair_rows(row, responses, list(itertools.product(chosen, worse)))

        return RowByRow(pair)


def _distinct(responses: Sequence[Mapping[str, Any]], low: float, high: float) -> list[int]:
    """Indices of responses with a score in [low, high], the first of equal texts only."""
    first: dict[str, int] = {}
    for index, response in enumerate(responses):
        if low <= response["score"] <= high:
            first.setdefault(response["text"], index)
    return list(first.values())


def _query(value: Any) -> str:
    if isinstance(value, list):
        users = (m for m in value if m.get("role") == "user" or m.get("from") == "human")
        first = next(users, {})
        value = first.get("content", first.get("value"))
    return value.strip() if isinstance(value, str) else ""
