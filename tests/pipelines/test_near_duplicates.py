"""Near-duplicates by MinHash against the similarity itself, computed for every two texts."""

from __future__ import annotations

import functools
import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.near_duplicates import (
    NearDuplicates,
    SignatureFile,
    band_rows,
    ngrams,
    signatures,
    words,
)
from tests.pipelines.pipelines import build, counts, rows
from tests.pipelines.test_prompts import prompts


def edited(text: str, draw: random.Random, changes: int) -> str:
    tokens = text.split()
    for position in draw.sample(range(len(tokens)), changes):
        tokens[position] = f"other{draw.random()}"
    return " ".join(tokens)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """120 texts of 150 words, each with one to three copies in which 0 to 12 words are others."""
    draw = random.Random(0)
    originals = [" ".join(f"w{draw.randint(0, 400)}" for _ in range(150)) for _ in range(120)]
    found = [
        edited(t, draw, draw.randint(0, 12)) for t in originals for _ in range(draw.randint(1, 3))
    ]
    return originals + found


@functools.cache  # every text meets every other one
def grams(text: str) -> frozenset[str]:
    return frozenset(ngrams(words(text), 5))


def jaccard(a: str, b: str) -> float:
    one, other = grams(a), grams(b)
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def test_the_estimate_is_the_jaccard_similarity_within_its_standard_error(texts: list[str]) -> None:
    settings = NearDuplicates()
    table = np.concatenate(list(signatures(texts, settings)))
    draw = random.Random(1)
    pairs = [(n, draw.randrange(120, len(texts))) for n in range(120)] + [
        (n, m) for n in range(40) for m in range(120, 160)
    ]
    errors = [(table[a] == table[b]).mean() - jaccard(texts[a], texts[b]) for a, b in pairs]
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.5 / np.sqrt(settings.num_permutations)


def test_clusters_are_those_of_all_pairs_compared(texts: list[str], tmp_path: Path) -> None:
    """A text is dropped if an earlier one is at least 0.8 alike; within 0.1 of it MinHash may err."""
    settings = NearDuplicates()
    file = SignatureFile(tmp_path / "signatures", settings)
    file.add(texts)
    first = file.first_of_kind()
    best = [
        max((jaccard(texts[n], texts[m]) for m in range(n)), default=0.0) for n in range(len(texts))
    ]
    dropped = first != np.arange(len(texts))
    assert sum(similarity >= 0.9 for similarity in best) > 30
    assert all(dropped[n] for n, similarity in enumerate(best) if similarity >= 0.9)
    assert not any(dropped[n] for n, similarity in enumerate(best) if similarity < 0.7)


def test_bands_find_a_pair_at_the_threshold_nineteen_times_of_twenty() -> None:
    """128 hashes at 0.8: bands of 9 give 1 - (1 - 0.8^9)^14 = 0.868, bands of 7 give 0.985, of 8 0.947."""
    assert band_rows(NearDuplicates()) == 7
    assert band_rows(NearDuplicates(threshold=0.5)) == 3  # 1 - (1 - 1/16)^32 = 0.873 for bands of 4


def test_short_texts_are_one_gram() -> None:
    assert ngrams(words("Hello, World!"), 5) == ["hello world"]
    assert ngrams(["a", "b", "c"], 2) == ["a b", "b c"]


def test_the_stage_keeps_the_first_of_each_kind(tmp_path: Path) -> None:
    draw = random.Random(3)
    originals = [" ".join(f"v{draw.randint(0, 900)}" for _ in range(120)) for _ in range(5)]
    copies = [edited(text, draw, 1) for text in originals[:3]]
    folder = build(prompts(tmp_path, [*originals, *copies], near_duplicates={}))
    assert [row["prompt"] for row in rows(folder / "prompts")] == originals
    assert counts(folder, "prompts")["dropped"] == {"near_duplicate": 3}
    assert all(jaccard(a, b) > 0.85 for a, b in zip(originals, copies, strict=False))
    assert all(jaccard(a, b) < 0.1 for a, b in itertools.combinations(originals, 2))
