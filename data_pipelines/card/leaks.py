"""Prompts that a held-out set also has: word for word, nearly, or by a run of words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.card.findings import Check, Section, share_check
from data_pipelines.card.pairs import PairView
from data_pipelines.contamination import Contamination, Decontamination, EvalSet, eval_prompts
from data_pipelines.near_duplicates import NearDuplicates, band_keys, band_rows, signatures
from data_pipelines.sketch import hash64

_BATCH = 2_000


class Leaks:
    """Looks each prompt up in one held-out set, which stays in memory.

    Args:
        each: task of `prefopt eval`, or file.
        settings: what counts as nearly the same.

    Raises: ConfigError, DataError for a set that is not there; ConfigError without rensa.
    """

    def __init__(self, each: EvalSet, settings: NearDuplicates) -> None:
        self.name = each.name
        self.settings = settings
        texts = list(eval_prompts(each))
        self.num_eval = len(texts)
        self._exact = {hash64(" ".join(text.split())) for text in texts}
        self._runs = Contamination(Decontamination(against=(each,)))
        self._table = np.concatenate(list(signatures(texts, settings)))
        self._bands = [
            dict(zip(keys.tolist(), range(len(keys)), strict=True))
            for keys in _bands(self._table, settings)
        ]
        self.num_pairs = self.exact = self.near = self.runs = 0
        self._waiting: list[str] = []

    def add(self, pair: PairView) -> None:
        self.num_pairs += 1
        if hash64(" ".join(pair.prompt_text.split())) in self._exact:
            self.exact += 1
            return
        self.runs += self._runs.found(pair.prompt_text) is not None
        self._waiting.append(pair.prompt_text)
        if len(self._waiting) == _BATCH:
            self._compare()

    def section(self) -> Section:
        self._compare()
        advice = "decontaminate the prompts (`prompts: decontaminate`), or what is measured on this set is memory"
        checks: Sequence[Check] = (
            share_check(
                "same prompts", self.exact, self.num_pairs, look=0.0, stop=0.001, advice=advice
            ),
            share_check(
                "nearly the same prompts",
                self.near,
                self.num_pairs,
                look=0.0,
                stop=0.01,
                advice=advice,
            ),
            share_check(
                "shared runs of 13 words",
                self.runs,
                self.num_pairs,
                look=0.0,
                stop=None,
                advice=advice,
            ),
        )
        numbers = {
            "num_eval": self.num_eval,
            "num_exact": self.exact,
            "num_near": self.near,
            "num_runs": self.runs,
        }
        note = (
            f"{self.num_eval:,} held-out prompts. Nearly: Jaccard similarity of word "
            f"{self.settings.ngram_words}-grams from {self.settings.threshold:g}, by MinHash. What is the same is "
            "counted there alone. Shared runs may be a template's."
        )
        return Section(
            f"leaks:{self.name}", f"Overlap with {self.name}", tuple(checks), numbers, note=note
        )

    def _compare(self) -> None:
        for rows in signatures(self._waiting, self.settings):
            similar = np.zeros(len(rows), dtype=bool)
            for keys, known in zip(_bands(rows, self.settings), self._bands, strict=True):
                for index, key in enumerate(keys.tolist()):
                    other = known.get(key)
                    if other is not None and not similar[index]:
                        similar[index] = (
                            rows[index] == self._table[other]
                        ).mean() >= self.settings.threshold
            self.near += int(similar.sum())
        self._waiting = []


def _bands(table: np.ndarray[Any, Any], settings: NearDuplicates) -> Iterator[np.ndarray[Any, Any]]:
    rows = band_rows(settings)
    for start in range(0, settings.num_permutations - rows + 1, rows):
        yield band_keys(table[:, start : start + rows])
