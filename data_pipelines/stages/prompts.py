"""Prompts from files or the hub: deduplicated, within limits, decontaminated; the start of most pipelines."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt

from data_pipelines.base import Dropped, Place, StageSettings
from data_pipelines.contamination import Contamination, Decontamination
from data_pipelines.external_order import ranks_of, reordered
from data_pipelines.near_duplicates import NearDuplicates, SignatureFile
from data_pipelines.reading import (
    SourceRow,
    count_source_rows,
    keep_problems,
    source_identity,
    source_rows,
)
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, prompt_text
from data_pipelines.sketch import hash64
from data_pipelines.words import words
from prefopt.data.rows import Refused
from prefopt.recipe.schema import ModelSection, PathText, Section, SourceSection
from prefopt.recipe.yaml_file import Document, KeyPath
from prefopt.report.bars import Bar

if TYPE_CHECKING:
    from prefopt.data.render import Renderer

_KEPT = ""


class Part(Section):
    """One of several disjoint parts of the prompts, drawn by a hash of their text."""

    number: PositiveInt
    """Which, from 1: a round takes `${round}`."""
    of: PositiveInt
    """How many (Arena Learning, arXiv:2407.10627, has nine)."""


@stage(
    "prompts",
    works="whole",
    gives=RowKind.PROMPTS,
    source="SimPO v0.2 (arXiv:2405.14734), Arena Learning (arXiv:2407.10627): dedup, decontamination, parts",
)
class Prompts(StageSettings):
    """Reads prompts and keeps those that are wanted; each other is counted under its first reason.

    Memory: about 60 bytes a prompt for exact duplicates and 10 for what becomes of it; signatures of
    near-duplicates lie on disk. A dialogue that ends with the assistant's turn is a prompt without that turn.
    """

    sources: Annotated[tuple[SourceSection, ...], Field(strict=False, min_length=1)]
    """As a recipe's `data.prompts`: local files or hub data sets, any format."""
    keep: tuple[str, ...] = Field(default=(), strict=False)
    """Columns that later stages read, e.g. `answer`; a dot descends (`metadata.answer`)."""
    min_chars: PositiveInt | None = None
    """Least characters of a prompt (Arena Learning: 10)."""
    max_chars: PositiveInt | None = None
    """Most characters of a prompt."""
    max_tokens: PositiveInt | None = None
    """Most tokens of a prompt as it is rendered, chat template included; needs `tokenizer`."""
    tokenizer: PathText | None = None
    """Model directory or hub id whose tokenizer counts `max_tokens`."""
    languages: tuple[str, ...] = Field(default=(), strict=False)
    """Keep these languages only (`[en]`), as langdetect sees them; about a millisecond a prompt."""
    part: Part | None = None
    """Take one of several disjoint parts."""
    drop_duplicates: bool = True
    """Drop prompts that an earlier one has word for word, but for white space."""
    near_duplicates: NearDuplicates | None = None
    """Drop prompts that nearly equal an earlier one, `near_duplicates: {}` with the defaults; null keeps them."""
    decontaminate: Decontamination | None = None
    """Drop what evaluations ask."""
    shuffle: bool = False
    """In an order drawn by the pipeline's seed; otherwise as they come."""
    max_prompts: PositiveInt | None = None
    """Keep the first so many, after shuffling."""

    def code(self) -> tuple[Any, ...]:
        near = () if self.near_duplicates is None else (NearDuplicates, words)
        return (*near, *(() if self.decontaminate is None else (Contamination, words)))

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        found = keep_problems(self.keep, document, path)
        where = document.origin(path)
        if (self.max_tokens is None) != (self.tokenizer is None):
            found.append(
                f"{where}prompts: max_tokens = {self.max_tokens}, tokenizer = {self.tokenizer!r}: go together"
            )
        if self.part is not None and self.part.number > self.part.of:
            at = document.origin((*path, "part"))
            found.append(
                f"{at}prompts.part: number = {self.part.number} of {self.part.of}: must be 1 to {self.part.of}"
            )
        for number, section in enumerate(self.sources):
            for key, why in _IGNORED.items():
                if key in section.model_fields_set and not (
                    key in _OF_RENDERING and self.tokenizer
                ):
                    at = document.origin((*path, "sources", number, key))
                    found.append(f"{at}prompts.sources.{number}.{key}: would be ignored: {why}")
        if self.decontaminate is not None:
            found += self.decontaminate.problems(document, (*path, "decontaminate"))
        return found

    def basis(self) -> Mapping[str, Any]:
        found = source_identity(self.sources)
        if self.decontaminate is not None:
            found["decontaminate"] = Contamination(self.decontaminate).hashes
        if self.tokenizer is not None:
            from prefopt.data.tokenise import tokenizer_hash
            from prefopt.model.load import load_tokenizer

            found["tokenizer"] = tokenizer_hash(load_tokenizer(ModelSection(path=self.tokenizer)))
        return found

    def num_rows_in(self, place: Place) -> int | None:
        del place
        return count_source_rows(self.sources)

    def run(self, place: Place) -> Iterator[Row | Dropped]:
        reasons, codes = self._judge(place)
        ranks = self._ranks(codes, place)
        shuffled = self.shuffle
        for index, row in enumerate(source_rows(self.sources, pairs=False)):
            reason = reasons[codes[index]]
            if reason:
                detail = row.found.detail if isinstance(row.found, Refused) else None
                yield Dropped(reason, detail, row.id)
            elif ranks[index] < 0:
                yield Dropped("beyond_max_prompts", id=row.id)
            elif not shuffled:
                yield self._row(row)
        if shuffled:
            rows = (self._row(row) for row in self._kept(codes))
            yield from reordered(rows, ranks[codes == 0], place.scratch / "order")

    def _judge(self, place: Place) -> tuple[list[str], np.ndarray[Any, Any]]:
        """First pass: the reasons there are (the first is none), and (N,) uint16 which one each row has."""
        judge = _Judge(self, place)
        numbers: dict[str, int] = {_KEPT: 0}
        codes = array("H")
        total, name = self.num_rows_in(place), f"{place.id}: first look"
        for row in Bar(source_rows(self.sources, pairs=False), name, total, unit="row"):
            reason = judge.reason(row)
            codes.append(numbers.setdefault(reason, len(numbers)))
        array_codes = np.frombuffer(codes, dtype=np.uint16).copy()
        if self.near_duplicates is not None:
            kept = np.flatnonzero(array_codes == 0)
            repeated = kept[self._repeats(array_codes, place)]
            array_codes[repeated] = numbers.setdefault("near_duplicate", len(numbers))
        return list(numbers), array_codes

    def _repeats(self, codes: np.ndarray[Any, Any], place: Place) -> np.ndarray[Any, Any]:
        """Which of the kept prompts nearly equal an earlier one."""
        assert self.near_duplicates is not None
        file = SignatureFile(place.scratch / "signatures", self.near_duplicates)
        file.add(_text(row) for row in self._kept(codes))
        first = file.first_of_kind()
        file.path.unlink(missing_ok=True)
        return np.flatnonzero(first != np.arange(len(first)))

    def _kept(self, codes: np.ndarray[Any, Any]) -> Iterator[SourceRow]:
        rows = source_rows(self.sources, pairs=False)
        return (row for row, code in zip(rows, codes, strict=True) if code == 0)

    def _ranks(self, codes: np.ndarray[Any, Any], place: Place) -> np.ndarray[Any, Any]:
        """(N,) int64 place of each kept row, -1 for others and for those beyond the first ``max_prompts``."""
        kept = np.flatnonzero(codes == 0)
        keys = np.arange(len(kept), dtype=np.float64)
        if self.shuffle:
            keys = np.random.Generator(np.random.PCG64(place.rng("order").getrandbits(64))).random(
                len(kept)
            )
        ranks = np.full(len(codes), -1, dtype=np.int64)
        ranks[kept] = ranks_of(keys, descending=False)
        ranks[ranks >= (self.max_prompts or math.inf)] = -1
        return ranks

    def _row(self, row: SourceRow) -> Row:
        assert not isinstance(row.found, Refused)
        given = row.found.options.columns  # tools, documents: what samples must be shown it too
        return {
            "id": row.id,
            "prompt": row.found.prompt,
            **given,
            **row.kept(self.keep),
        }


_OF_RENDERING = ("template_omits", "control_tokens")
_IGNORED = {
    "weight": "every prompt is read once",
    "drop_ties": "every prompt is read once",
    **dict.fromkeys(_OF_RENDERING, "nothing is rendered here; set it on the stage that does"),
}


class _Judge:
    """Why a prompt is not wanted, looked at once and in the order of the rows."""

    def __init__(self, settings: Prompts, place: Place) -> None:
        self.settings = settings
        self.seed = place.seed
        self._seen: set[int] = set()
        self._contamination = (
            Contamination(settings.decontaminate) if settings.decontaminate is not None else None
        )
        self._renderer = _renderer(settings.tokenizer) if settings.tokenizer is not None else None

    def reason(self, row: SourceRow) -> str:
        """The first reason, empty for a prompt that is kept."""
        if isinstance(row.found, Refused):
            return str(row.found.reason)
        row.kept(self.settings.keep)  # raises, naming the columns there are
        text = _text(row)
        return (
            self._outside(text)
            or self._other_part(text)
            or self._repeated(text)
            or self._costly(row, text)
        )

    def _outside(self, text: str) -> str:
        low, high = self.settings.min_chars, self.settings.max_chars
        if low is not None and len(text) < low:
            return "chars_below"
        return "chars_above" if high is not None and len(text) > high else _KEPT

    def _other_part(self, text: str) -> str:
        part = self.settings.part
        if part is None or hash64(f"{self.seed}\0{text}") % part.of == part.number - 1:
            return _KEPT
        return "other_part"

    def _repeated(self, text: str) -> str:
        if not self.settings.drop_duplicates:
            return _KEPT
        key = hash64(" ".join(text.split()))
        if key in self._seen:
            return "duplicate"
        self._seen.add(key)
        return _KEPT

    def _costly(self, row: SourceRow, text: str) -> str:
        if (
            self._contamination is not None
            and (name := self._contamination.found(text)) is not None
        ):
            return f"contaminated:{name}"
        if self._renderer is not None and (reason := self._too_many_tokens(row)):
            return reason
        if self.settings.languages:
            from prefopt.signals.language import detect_language

            language = detect_language(text)
            if language not in self.settings.languages:
                return f"language:{language or 'none'}"
        return _KEPT

    def _too_many_tokens(self, row: SourceRow) -> str:
        from prefopt.data.render import Request

        assert self._renderer is not None and self.settings.max_tokens is not None
        assert not isinstance(row.found, Refused)
        request = Request(row.found.prompt, (), options=row.found.options)
        (found,) = self._renderer.render_batch([request])
        if isinstance(found, Refused):
            return str(found.reason)
        return "tokens_above" if len(found.prompt_ids) > self.settings.max_tokens else _KEPT


def _renderer(path: str) -> Renderer:
    from prefopt.data.render import Renderer
    from prefopt.model.load import load_tokenizer

    return Renderer(load_tokenizer(ModelSection(path=path)))


def _text(row: SourceRow) -> str:
    assert not isinstance(row.found, Refused)
    return prompt_text({"prompt": row.found.prompt})
