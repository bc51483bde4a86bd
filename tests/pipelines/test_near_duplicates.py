"""Near-duplicates by MinHash against the similarity itself, computed for every two texts."""

from __future__ import annotations

import functools
import itertools
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.near_duplicates import (
    NearDuplicates,
    SignatureFile,
    band_rows,
    signatures,
)
from data_pipelines.words import ngrams, num_words, words
from tests.eval.runs import write_jsonl
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


def test_ascii_text_has_the_units_that_any_text_has() -> None:
    draw = random.Random(5)
    for _ in range(300):
        text = "".join(chr(draw.randrange(9, 127)) for _ in range(40))
        assert words(text) == words(f"{text} é")[:-1] or not any(map(str.isalnum, text))


@pytest.mark.parametrize(
    ("text", "units", "count"),
    [
        ("小明有12个", ["小", "明", "有", "12", "个"], 3),
        ("ラーメン。", ["ラ", "ー", "メ", "ン"], 2),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"], 2),
        ("한국어 문장", ["한국어", "문장"], 2),
        ("हिन्दी की का", ["हिन्दी", "की", "का"], 3),
        ("ＧＰＴ３ ｶﾞ", ["gpt3", "ガ"], 1.5),
        ("CAFE\u0301 café", ["café", "café"], 2),
        ("a 🚲 → 🏔\ufe0f ?", ["a", "🚲", "→", "🏔"], 2.5),
        ("🚲 → 🏔\ufe0f ?", ["🚲→🏔\ufe0f?"], 0.5),
        ("ﬁnd 𝑥 + ① ㎏", ["find", "x", "+", "1", "kg"], 4.5),
        ("x² ½", ["x²", "½"], 2),
        ("ﻛﺘﺎﺏ", ["كتاب"], 1),
        ("17 * 3 = 51?", ["17", "*", "3", "=", "51"], 4),
        ("2024-01", ["2024", "-", "01"], 2.5),
        ("**bold** - and `code`: $x$", ["bold", "and", "code", "x"], 4),
        ("?!", ["?!"], 0.5),
        ("___ ---", ["___---"], 1),
        ("", [], 0),
    ],
)
def test_units_of_every_script(text: str, units: list[str], count: float) -> None:
    assert words(text) == units
    assert num_words(units) == count


def test_runs_of_a_script_without_spaces_are_as_long_in_words() -> None:
    assert ngrams(words("小明有十二个"), 2) == ["小 明 有 十", "明 有 十 二", "有 十 二 个"]
    assert ngrams(words("读 book 和书"), 2) == ["读 book 和", "book 和 书"]
    assert ngrams(words("小明"), 1) == ["小 明"]


DIFFERENT = (
    "🚲 → 🏔️ ?", "🎂 + 🎁 !", "What is 17 * 3?", "What is 17 - 3?", "?!", "...", "…", "की", "का", "👍🏽", "👍🏿",
    "👨‍👩‍👧", "👨👩👧", "🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎯", "🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎲🎰",
)  # fmt: skip


def test_copies_in_any_language_are_near_duplicates_and_different_short_texts_are_not(
    tmp_path: Path,
) -> None:
    long = {
        "zh": "图书馆里有九十六本书，上午借出三十一本，下午又还回来十四本，傍晚还有多少本书留在书架上呢？",
        "ja": "図書館に本が九十六冊あります。午前に三十一冊貸し出し、午後に十四冊戻りました。今は何冊ありますか。",
        "th": "ห้องสมุดมีหนังสือเก้าสิบหกเล่มตอนเช้าให้ยืมสามสิบเอ็ดเล่มตอนบ่ายได้คืนสิบสี่เล่มเหลือกี่เล่ม",
        "hi": "पुस्तकालय में छियानवे किताबें हैं और सुबह इकतीस किताबें दी गईं फिर दोपहर में चौदह लौटीं अब कितनी बची हैं",
        "ar": "في المكتبة ستة وتسعون كتابا أعير منها صباحا واحد وثلاثون ثم عاد ظهرا أربعة عشر فكم كتابا فيها",
    }
    copies = [f"{text} 🙏" for text in long.values()]
    folder = build(
        prompts(tmp_path, [*long.values(), *copies, *DIFFERENT], near_duplicates={"threshold": 0.7})
    )
    assert [row["prompt"] for row in rows(folder / "prompts")] == [*long.values(), *DIFFERENT]
    assert counts(folder, "prompts")["dropped"] == {"near_duplicate": len(copies)}
    # within another text, word for word, whatever its Unicode form
    file = write_jsonl(tmp_path / "test.jsonl", [{"prompt": text} for text in long.values()])
    against = {"against": [{"path": str(file)}]}
    wrapped = [unicodedata.normalize("NFD", f"1) {text} 2)") for text in long.values()]
    other = prompts(tmp_path, [*wrapped, *DIFFERENT], decontaminate=against)
    folder = build(other, "output_dir=" + str(tmp_path / "second"))
    folder = tmp_path / "second"
    assert [row["prompt"] for row in rows(folder / "prompts")] == list(DIFFERENT)


def test_the_stage_keeps_the_first_of_each_kind(tmp_path: Path) -> None:
    draw = random.Random(3)
    originals = [" ".join(f"v{draw.randint(0, 900)}" for _ in range(120)) for _ in range(5)]
    copies = [edited(text, draw, 1) for text in originals[:3]]
    folder = build(prompts(tmp_path, [*originals, *copies], near_duplicates={}))
    assert [row["prompt"] for row in rows(folder / "prompts")] == originals
    assert counts(folder, "prompts")["dropped"] == {"near_duplicate": 3}
    assert all(jaccard(a, b) > 0.85 for a, b in zip(originals, copies, strict=False))
    assert all(jaccard(a, b) < 0.1 for a, b in itertools.combinations(originals, 2))
