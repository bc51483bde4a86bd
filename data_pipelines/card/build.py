"""Makes a card: one pass over the pairs, then what is asked of a sample of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipelines.card.agreement import Agreement
from data_pipelines.card.findings import Card, Section
from data_pipelines.card.leaks import Leaks
from data_pipelines.card.measures import Duplicates, Lengths, Margins, Sizes
from data_pipelines.card.ngrams import ngram_section
from data_pipelines.card.pairs import PairSource, PairView, RefusedPair
from data_pipelines.card.provenance import provenance_section
from data_pipelines.card.texts import (
    Ends,
    Markers,
    Refusals,
    language_section,
    repetition_check,
    text_section,
)
from data_pipelines.contamination import EvalSet
from data_pipelines.near_duplicates import NearDuplicates
from data_pipelines.sketch import BottomSample, hash64
from prefopt.errors import ConfigError, DataError, suggest
from prefopt.recipe.local_paths import is_local_data
from prefopt.report.bars import Bar

SAMPLE = 10_000
"""Pairs that slow questions are asked of: n-grams, repetition, rendering."""
LANGUAGE_SAMPLE = 500
"""langdetect takes milliseconds a text."""


@dataclass(frozen=True)
class CardSettings:
    """What a card is asked for beside the pairs."""

    held_out: tuple[EvalSet, ...] = ()
    tokenizer: str | None = None
    chat_template: str | None = None


def held_out_set(name: str) -> EvalSet:
    """A held-out set by what a command line calls it: a task of `prefopt eval`, or a file or data set.

    Raises: ConfigError naming the nearest task for what is neither.
    """
    from eval.registry import task_names

    if name in task_names():
        return EvalSet(task=name)
    if not is_local_data(name) and "/" not in name:
        raise ConfigError(
            f"--held-out {name}: neither a file, a data set nor a task of `prefopt eval`; "
            f"{suggest(name, task_names())}"
        )
    return EvalSet(path=name)


def make_card(source: PairSource, settings: CardSettings) -> Card:
    """The card of a pair set; the same bytes for the same rows.

    Memory: about 70 bytes a pair, and the held-out sets.
    Raises: DataError naming file and line for rows that are no pairs, or if there is none; ConfigError,
        ModelError for settings that cannot work.
    """
    tokenizer = _tokenizer(settings)
    passes = _Pass(tokenizer, [Leaks(each, NearDuplicates()) for each in settings.held_out])
    for row in Bar(source.pairs(), desc="card", total=source.num_rows(), unit="row"):
        passes.add(row)
    if not passes.sizes.num_pairs:
        reasons = ", ".join(f"{n:,} {name}" for name, n in passes.sizes.refused.most_common())
        raise DataError(f"{source.path}: holds not one pair that can be trained on ({reasons})")
    sections = passes.sections()
    if tokenizer is not None:
        from data_pipelines.card.rendering import rendered_sections

        sections += rendered_sections(list(passes.sample), tokenizer)
    if source.stage_folder is not None:
        sections.append(provenance_section(source.stage_folder))
    return Card(source.path, tuple(sections))


class _Pass:
    """Everything that looks at each pair."""

    def __init__(self, tokenizer: Any, leaks: Sequence[Leaks]) -> None:
        tokens = tokenizer.all_special_tokens if tokenizer is not None else ()
        self.sizes = Sizes()
        self.lengths = Lengths()
        self.margins = Margins()
        self.duplicates = Duplicates()
        self.markers, self.ends, self.refusals = Markers(tokens), Ends(), Refusals()
        self.agreement = Agreement()
        self.leaks = list(leaks)
        self.sample: BottomSample[PairView] = BottomSample(SAMPLE)
        self._looking = (
            self.sizes, self.lengths, self.margins, self.duplicates, self.markers, self.ends, self.refusals,
            self.agreement, *self.leaks,
        )  # fmt: skip

    def add(self, row: PairView | RefusedPair) -> None:
        if isinstance(row, RefusedPair):
            for each in (self.sizes, self.margins, self.duplicates):
                each.refuse(row)
            return
        for each in self._looking:
            each.add(row)
        self.sample.add(hash64(row.id, row.prompt_text[:100], row.chosen[:100]), row)

    def sections(self) -> list[Section]:
        sample = list(self.sample)
        check, shares = repetition_check(sample)
        texts = text_section(self.markers, self.ends, self.refusals)
        numbers = {**texts.numbers, "repetitive_share": shares}
        note = f"Repetition on {len(sample):,} pairs drawn by hash; all else on every row."
        texts = Section(
            texts.name, texts.title, (*texts.checks, check), numbers, tables=texts.tables, note=note
        )
        return [
            self.sizes.section(),
            self.lengths.section(),
            self.margins.section(),
            self.duplicates.section(),
            texts,
            ngram_section(sample),
            language_section(sample[:LANGUAGE_SAMPLE]),
            self.agreement.section(),
            *(leak.section() for leak in self.leaks),
        ]


def _tokenizer(settings: CardSettings) -> Any:
    if settings.tokenizer is None:
        return None
    from prefopt.model.load import load_tokenizer
    from prefopt.recipe.schema import ModelSection

    section = ModelSection(
        path=settings.tokenizer, tokenizer=settings.tokenizer, chat_template=settings.chat_template
    )
    return load_tokenizer(section)
