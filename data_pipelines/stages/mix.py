"""Mixes the rows so far with those of other sources, each to its share, in a seeded random order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from data_pipelines.base import Dropped, Place, StageSettings
from data_pipelines.external_order import reordered
from data_pipelines.reading import kept_columns
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, require_columns
from prefopt.data.sources import LocalFiles, open_source, sound_rows
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.schema import PathText, Section, SourceSection
from prefopt.recipe.yaml_file import Document, KeyPath


class MixSource(Section):
    """Rows of another pipeline, of the same kind as those so far."""

    path: PathText
    """A stage's folder (`data/offline/filter`), or files of such rows. A foreign pair set goes through a pipeline
    of its own first: `rated`."""
    share: Annotated[float, Field(gt=0, lt=1)]
    """Share of the result: 0.7 makes it seven tenths of all rows."""
    name: str | None = None
    """What the column `source` calls it; default: the path."""
    repeat: bool = False
    """Take rows more than once where there are too few; otherwise that is an error."""

    @property
    def label(self) -> str:
        return self.name or self.path


@stage(
    "mix",
    works="whole",
    reads={RowKind.PROMPTS, RowKind.GROUPS, RowKind.PAIRS, RowKind.SAMPLES},
    source="LIONs (arXiv:2407.06542): p_ori_pair; SeRA (arXiv:2410.09362): 70 % offline, 30 % bootstrapped",
)
class Mix(StageSettings):
    """Adds rows of other sources, so that each makes up its share, and shuffles all.

    All rows so far are taken; of each source as many as its share needs, drawn without replacement. Every
    row gets the column `source`, and rows of other sources an id that starts with its name.
    """

    sources: Annotated[tuple[MixSource, ...], Field(strict=False, min_length=1)]
    """What to add; their shares add up to less than 1, and the rows so far make up the rest."""
    name: str = "new"
    """What the column `source` calls the rows so far."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        where = document.origin((*path, "sources"))
        found = []
        total = sum(each.share for each in self.sources)
        if not total < 1:
            found.append(
                f"{where}mix.sources: their shares add up to {total:g}, and must leave room for the rest"
            )
        labels = [self.name, *(each.label for each in self.sources)]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            found.append(
                f"{where}mix.sources: two are called {twice[0]!r}; give each a name of its own"
            )
        return found

    def basis(self) -> Mapping[str, Any]:
        return {each.label: _open(each).identity() for each in self.sources}

    def run(self, place: Place) -> Iterator[Row | Dropped]:
        assert place.input is not None and place.reads is not None
        own = place.input.num_rows
        rest = 1 - sum(each.share for each in self.sources)
        draws = [np.ones(own, dtype=np.int64)]
        for source in self.sources:
            draws.append(_draw(source, round(own * source.share / rest), place))
        parts = [_labelled(place.input.rows(), self.name, "")]
        for source, counts in zip(self.sources, draws[1:], strict=True):
            rows = _source_rows(source, place.reads)
            yield from _undrawn(_source_rows(source, place.reads), counts, source)
            parts.append(_labelled(_taken(rows, counts), source.label, f"{source.label}/"))
        total = int(sum(counts.sum() for counts in draws))
        yield from reordered(chain(*parts), _shuffled(total, place), place.scratch)


def _open(source: MixSource) -> LocalFiles:
    opened = open_source(SourceSection(path=source.path))
    if not isinstance(opened, LocalFiles):
        raise ConfigError(
            f"mix: path = {source.path!r}: no such files. A hub data set goes through a pipeline of its own "
            "first: rated"
        )
    return opened


def _source_rows(source: MixSource, kind: RowKind) -> Iterator[Row]:
    for raw in sound_rows(_open(source).rows()):
        require_columns(raw.data, kind, raw.where)
        kept_columns(raw, tuple(raw.data))  # raises for what no shard can hold
        yield {key: value for key, value in raw.data.items() if value is not None}


def _draw(source: MixSource, wanted: int, place: Place) -> np.ndarray[Any, Any]:
    """(N,) int64: how often each row of a source is taken. Raises: DataError if there are too few."""
    assert place.reads is not None
    count = sum(1 for _ in _source_rows(source, place.reads))
    if count == 0 or (wanted > count and not source.repeat):
        raise DataError(
            f"mix: {source.path} has {count:,} rows, and share = {source.share:g} needs {wanted:,}. Lower the "
            "share, add rows, or set repeat: true"
        )
    whole, rest = divmod(wanted, count)
    times = np.full(count, whole, dtype=np.int64)
    generator = _generator(place, source.label)
    times[generator.permutation(count)[:rest]] += 1
    return times


def _undrawn(
    rows: Iterator[Row], counts: np.ndarray[Any, Any], source: MixSource
) -> Iterator[Dropped]:
    for row, times in zip(rows, counts.tolist(), strict=True):
        if times == 0:
            yield Dropped("not_drawn", id=f"{source.label}/{row['id']}")


def _taken(rows: Iterator[Row], counts: np.ndarray[Any, Any]) -> Iterator[Row]:
    for row, times in zip(rows, counts.tolist(), strict=True):
        for number in range(times):
            yield row if number == 0 else {**row, "id": f"{row['id']}~{number + 1}"}


def _labelled(rows: Iterator[Row], label: str, prefix: str) -> Iterator[Row]:
    for row in rows:
        yield {**row, "id": f"{prefix}{row['id']}", "source": label}


def _shuffled(count: int, place: Place) -> np.ndarray[Any, Any]:
    return _generator(place, "order").permutation(count).astype(np.int64)


def _generator(place: Place, key: str) -> np.random.Generator:
    """numpy's, seeded through the place's own: draws for a million rows at once."""
    return np.random.Generator(np.random.PCG64(place.rng(key).getrandbits(64)))
