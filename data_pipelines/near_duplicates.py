"""Near-duplicate texts by MinHash (the library rensa), in bands, on disk: memory does not grow with the texts."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt

from data_pipelines.shards import in_shards
from data_pipelines.words import ngrams, words
from prefopt.errors import ConfigError
from prefopt.recipe.schema import Section

_BATCH = 2_000
_SEED = 1


class NearDuplicates(Section):
    """Which texts count as nearly the same: the Jaccard similarity of their word n-grams, estimated by MinHash."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Similarity from which on two texts are near-duplicates."""
    ngram_words: PositiveInt = 5
    """Words of an n-gram. A text with fewer is one n-gram. Two characters of a script without spaces, and two
    symbols, count as one word."""
    num_permutations: Annotated[int, Field(ge=16)] = 128
    """Hashes of a signature: the estimate's standard error is at most 0.5 / √n. 4 bytes each, on disk."""


def signatures(texts: Iterable[str], settings: NearDuplicates) -> Iterator[np.ndarray[Any, Any]]:
    """Arrays (B, num_permutations) uint32 of MinHash signatures, in the order of the texts.

    Raises: ConfigError if rensa is not installed.
    """
    minhash = _rensa().RMinHash
    for batch in in_shards(texts, _BATCH):
        tokens = [ngrams(words(text), settings.ngram_words) for text in batch]
        rows = minhash.digests_from_token_sets(tokens, settings.num_permutations, _SEED)
        yield np.asarray(rows, dtype=np.uint32)


class SignatureFile:
    """Signatures of many texts in one file, compared band by band.

    On disk 4 · num_permutations bytes a text; in memory about 24 bytes a text while one band is compared.

    Args:
        path: of the file, made anew.
        settings: similarity.
    """

    def __init__(self, path: Path, settings: NearDuplicates) -> None:
        self.path = path
        self.settings = settings
        self.count = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)

    def add(self, texts: Iterable[str]) -> None:
        """Appends the signatures of ``texts``."""
        with self.path.open("ab") as file:
            for rows in signatures(texts, self.settings):
                file.write(rows.tobytes())
                self.count += len(rows)

    def first_of_kind(self) -> np.ndarray[Any, Any]:
        """(N,) int64: for each text the first text that it nearly equals, itself where there is none earlier.

        Texts that share a band of their signatures are compared by their whole signatures with the first text
        of that band: the number of comparisons is linear.
        """
        first = np.arange(self.count, dtype=np.int64)
        if self.count == 0:
            return first
        width = self.settings.num_permutations
        table = np.memmap(self.path, dtype=np.uint32, mode="r", shape=(self.count, width))
        rows = band_rows(self.settings)
        for start in range(0, width - rows + 1, rows):
            keys = band_keys(table[:, start : start + rows])
            later, earlier = _matches(keys)
            similar = _similarity(table, later, earlier) >= self.settings.threshold
            _join(first, later[similar], earlier[similar])
        return _roots(first)


def band_rows(settings: NearDuplicates) -> int:
    """Hashes of a band, as many as still find a pair at the threshold in 19 of 20 cases.

    A pair of similarity s shares one of n/r bands of r hashes with probability 1 - (1 - s^r)^(n/r).
    """
    best = 1
    for rows in range(1, settings.num_permutations + 1):
        bands = settings.num_permutations // rows
        if 1 - (1 - settings.threshold**rows) ** bands >= 0.95:
            best = rows
    return best


def band_keys(band: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(N,) uint64, equal where the bands (N, r) are equal, and else as good as never."""
    keys = np.full(len(band), 0xCBF29CE484222325, dtype=np.uint64)
    for column in range(band.shape[1]):
        keys = (keys ^ band[:, column].astype(np.uint64)) * np.uint64(0x100000001B3)
        keys ^= keys >> np.uint64(29)
    return keys


def _matches(keys: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Each text whose key an earlier one has, and the first that has it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    leader = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    differs = leader != order
    return order[differs], leader[differs]


def _similarity(
    table: np.ndarray[Any, Any], later: np.ndarray[Any, Any], earlier: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    found = np.empty(len(later))
    for start in range(0, len(later), _BATCH):
        part = slice(start, start + _BATCH)
        found[part] = (table[later[part]] == table[earlier[part]]).mean(axis=1)
    return found


def _join(
    first: np.ndarray[Any, Any], later: np.ndarray[Any, Any], earlier: np.ndarray[Any, Any]
) -> None:
    for one, other in zip(later.tolist(), earlier.tolist(), strict=True):
        a, b = _root(first, one), _root(first, other)
        if a != b:
            first[max(a, b)] = min(a, b)


def _root(first: np.ndarray[Any, Any], index: int) -> int:
    while first[index] != index:
        first[index] = first[first[index]]
        index = int(first[index])
    return index


def _roots(first: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    while True:
        above = first[first]
        if np.array_equal(above, first):
            return first
        first = above


def _rensa() -> Any:
    try:
        return importlib.import_module("rensa")
    except ImportError as error:
        raise ConfigError(
            'near-duplicates are found by rensa, which is not installed: pip install "prefopt[data]"'
        ) from error
