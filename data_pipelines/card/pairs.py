"""Pairs as a card reads them: from a stage's folder, or from any file or hub data set that training reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipelines.rows import prompt_text
from eval.preference_data import score_columns, scores_of
from prefopt.data.formats import Reading, canonical, resolve
from prefopt.data.options import PLAIN, RenderOptions
from prefopt.data.readers import RawRow
from prefopt.data.rows import Refused, Reject, has_column, row_id, score
from prefopt.data.sources import first_rows, open_source
from prefopt.errors import DataError
from prefopt.recipe.load import load_settings
from prefopt.recipe.schema import SourceSection
from prefopt.recipe.yaml_file import Document, apply_overrides

_OWN = ("id", "prompt", "chosen", "rejected")
_SCORES = ("score_chosen", "score_rejected")


@dataclass(frozen=True)
class PairView:
    """One pair; ``prompt`` as it is rendered, ``prompt_text`` as it is read."""

    id: str
    prompt: Any
    prompt_text: str
    chosen: str
    rejected: str
    score_chosen: float | None = None
    score_rejected: float | None = None
    info: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
    """What is known of the chosen and the rejected response: model, scores, ended."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The row as it stands in the file."""
    responses: tuple[Any, ...] = ()
    """Both sides as they are rendered."""
    options: RenderOptions = PLAIN

    @property
    def margin(self) -> float | None:
        if self.score_chosen is None or self.score_rejected is None:
            return None
        return self.score_chosen - self.score_rejected


@dataclass(frozen=True)
class RefusedPair:
    """A row that training refuses, and whether its scores are equal."""

    reason: Reject
    is_tie: bool


@dataclass(frozen=True)
class PairSource:
    """Where the pairs of a card come from.

    Args:
        path: folder of a stage, file, directory, glob, or hub data set.
        settings: ``key=value`` of a data source (`columns.score_chosen=…`, `format=hh`).
    """

    path: str
    settings: Sequence[str] = ()

    @property
    def stage_folder(self) -> Path | None:
        """The folder, if it is one that a pipeline made."""
        folder = Path(self.path)
        return folder if (folder.parent / "manifest" / folder.name).is_dir() else None

    def section(self) -> SourceSection:
        """The data source. Raises: ConfigError for settings that are none."""
        document = apply_overrides(Document({}), self.settings)
        document = replace(document, raw={"path": self.path, **document.raw})
        return load_settings(SourceSection, document, self.path)

    def num_rows(self) -> int | None:
        """About how many rows there are, for a progress bar."""
        section = self.section()
        count = open_source(section).num_rows()
        limit = section.max_rows
        return count if count is None or limit is None else min(count, limit)

    def pairs(self) -> Iterator[PairView | RefusedPair]:
        """Every row, as training would read it: a pair, or why it would be refused.

        Raises: DataError naming file and line for rows that are no pairs, or if there is no row.
        """
        section = self.section()
        reading: Reading | None = None
        usual: tuple[str, str] | None = None
        for raw in first_rows(open_source(section), section.max_rows):
            if reading is None:
                reading, usual = _reading(section, raw), score_columns(section.columns, raw)
            yield _view(raw, reading, usual)
        if reading is None:
            raise DataError(f"{section.path}: holds no rows")


def _reading(section: SourceSection, first: RawRow) -> Reading:
    """As training reads the source; columns that a pipeline's pairs have are found without being named."""
    found = {}
    if all(name in first.data for name in _OWN) and "id" not in section.columns.model_fields_set:
        found["id"] = "id"
    columns = section.columns.model_copy(update=found)
    return resolve(section.model_copy(update={"columns": columns}), first, pairs=True)


def _view(raw: RawRow, reading: Reading, usual: tuple[str, str] | None) -> PairView | RefusedPair:
    found = canonical(raw, reading)
    scores = _scores(raw, reading, usual)
    if isinstance(found, Refused):
        return RefusedPair(found.reason, None not in scores and scores[0] == scores[1])
    sides = [each if isinstance(each, str) else str(each["content"]) for each in found.responses]
    return PairView(
        row_id(raw, reading.columns.id),
        found.prompt,
        prompt_text({"prompt": found.prompt}),
        sides[0],
        sides[1],
        *scores,
        (_info(raw, "info_chosen"), _info(raw, "info_rejected")),
        raw.data,
        found.responses,
        found.options,
    )


def _scores(
    raw: RawRow, reading: Reading, usual: tuple[str, str] | None
) -> tuple[float | None, float | None]:
    """Scores under the names that were given, else a pipeline's own, which some rows may lack, else ``usual``.

    ``usual``: the columns in which `prefopt eval score pair_accuracy` finds scores without being told.
    """
    names = (reading.columns.score_chosen, reading.columns.score_rejected)
    if names == (None, None) and usual not in (None, _SCORES):
        return scores_of(raw, usual)
    found = [
        score(raw, name or (own if has_column(raw.data, own) else None))
        for name, own in zip(names, _SCORES, strict=True)
    ]
    return found[0], found[1]


def _info(raw: RawRow, name: str) -> Mapping[str, Any]:
    info = raw.data.get(name)
    return info if isinstance(info, dict) else {}
