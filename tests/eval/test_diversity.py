"""Diversity against counts made by hand, the official code's own arithmetic and sacrebleu."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sacrebleu

from eval.base import Answer, Example
from eval.registry import make_task
from eval.score import score_file
from eval.tasks.diversity import corpus_distinct, sequence_diversity
from prefopt.errors import DataError
from tests.eval.runs import write_jsonl

CORPUS = ("a b a b", "a b c")


def score(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return score_file("diversity", write_jsonl(tmp_path / "rows.jsonl", rows), options)


def test_distinct_n_divides_by_ngrams_and_a_lols_by_words() -> None:
    """Words a b a b | a b c: 3 different of 7. Bigrams ab ba ab | ab bc: 3 of 5. Trigrams aba bab | abc: 3."""
    found = {name: metric.value for name, metric in corpus_distinct(CORPUS).items()}
    assert found == pytest.approx(
        {
            "distinct_1": 100 * 3 / 7,
            "distinct_1_alol": 100 * 3 / 7,
            "distinct_2": 100 * 3 / 5,
            "distinct_2_alol": 100 * 3 / 7,
            "distinct_3": 100 * 3 / 3,
            "distinct_3_alol": 100 * 3 / 7,
        }
    )


def test_distinct_n_counts_as_sets_of_tuples_do() -> None:
    """The arrays against the definition, on texts that repeat themselves at every length."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcde", k=draw.randrange(9))) for _ in range(300)]
    found = corpus_distinct(texts)
    words = [text.split() for text in texts]
    total = sum(map(len, words))
    for n in (1, 2, 3):
        ngrams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
        assert found[f"distinct_{n}"].value == pytest.approx(100 * len(set(ngrams)) / len(ngrams))
        assert found[f"distinct_{n}_alol"].value == pytest.approx(100 * len(set(ngrams)) / total)


def test_no_ngram_crosses_from_one_response_into_the_next() -> None:
    assert corpus_distinct(["x", "y", "x"])["distinct_2"].value == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a b a b", 2 / 4 + 2 / 3 + 2 / 2), ("a b", 2 / 2 + 1 / 1), ("a", 1.0), ("", 0.0)],
)
def test_sequence_diversity_is_the_sum_of_a_responses_own_ratios(
    text: str, expected: float
) -> None:
    assert sequence_diversity(text) == pytest.approx(expected)


def test_self_bleu_is_sacrebleus_of_each_sample_against_the_others(tmp_path: Path) -> None:
    samples = [
        "the cat sat on the mat today",
        "the cat sat on the sofa today",
        "dogs run fast in the park today",
    ]
    found = score(tmp_path, [{"prompt": "p", "response": text} for text in samples])
    expected = [
        sacrebleu.sentence_bleu(text, [s for s in samples if s != text]).score for text in samples
    ]
    assert found["self_bleu"] == pytest.approx(sum(expected) / 3)
    assert found["corpus_self_bleu"] == pytest.approx(sum(expected) / 3)
    assert expected[0] > 50 > expected[2]


def test_equal_samples_have_a_self_bleu_of_100_and_one_sample_has_none(tmp_path: Path) -> None:
    same = score(tmp_path, [{"prompt": "p", "responses": ["one two three four five"] * 3}])
    assert same["self_bleu"] == pytest.approx(100)
    alone = score(tmp_path, [{"prompt": "p", "response": "one two"}])
    assert "self_bleu" not in alone and "prompt_distinct_2" not in alone


def test_samples_of_one_prompt_are_one_row_wherever_they_stand(tmp_path: Path) -> None:
    """Within p: bigrams ab ab | ab bc make 2 of 3 … by prompt: p {ab} of 2, q {cd, de} of 2."""
    rows = [("p", "a b"), ("q", "c d"), ("p", "a b"), ("q", "d e")]
    found = score(tmp_path, [{"prompt": p, "response": text} for p, text in rows])
    assert (found["n"], found["n_responses"]) == (2, 4)
    assert found["prompt_distinct_2"] == pytest.approx(100 * (1 / 2 + 2 / 2) / 2)
    assert found["distinct_2"] == pytest.approx(100 * 3 / 4)


def test_models_of_one_file_are_told_apart(tmp_path: Path) -> None:
    rows = [
        {"generator": "x", "instruction": "p", "output": "a a a"},
        {"generator": "y", "instruction": "p", "output": "a b c"},
    ]
    models = score(tmp_path, rows)["models"]
    assert models["x"]["distinct_1"] == pytest.approx(100 / 3)
    assert models["y"]["distinct_1"] == 100


def test_null_and_empty_responses_are_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "response": None},
        {"prompt": "q", "response": "  "},
        {"prompt": "r", "response": "a b"},
    ]
    found = score(tmp_path, rows)
    assert (found["n"], found["n_responses"]) == (3, 2)
    assert found["num_null_response"] == found["num_empty_response"] == found["n_empty"] == 1
    with pytest.raises(DataError, match="no row has a response"):
        score(tmp_path, rows[:2])


def test_the_eos_rate_is_known_where_rows_say_how_they_ended(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "response": "a b", "finish_reason": "stop"} for i in range(3)]
    rows.append({"prompt": "3", "response": "a b", "finish_reason": "length"})
    assert score(tmp_path, rows)["eos_rate"] == 75
    assert "eos_rate" not in score(tmp_path, [{"prompt": "p", "response": "a b"}])


def test_generated_samples_become_rows_with_lengths_and_endings() -> None:
    task = make_task("diversity", {"data": "unused.jsonl"})
    answers = [Answer("a b", 3, True), Answer("a b c", 4, False)]
    row = task.row(Example("k", "p"), [(answer,) for answer in answers], {})
    # bigrams ab | ab bc: 2 different of 3; words a b | a b c: 3 of 5; one trigram
    values = {key: value for key, value in row.values.items() if key != "self_bleu"}
    assert values == pytest.approx({"distinct_2": 2 / 3, "distinct_1": 3 / 5, "distinct_3": 1.0})
    assert next(iter(row.values)) == "distinct_2"
    assert row.details == {
        "responses": ["a b", "a b c"],
        "tokens": [3, 4],
        "ended": [True, False],
    }


def test_a_prompt_that_could_not_be_asked_is_counted(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "p"}, {"prompt": "q"}, {"prompt": "p"}])
    task = make_task("diversity", {"data": str(data)})
    one, two = task.examples()
    rows = [
        task.row(one, [(Answer("a b", 3),)] * 4, {}),
        task.row(two, [(Answer("", 0, False, problem="prompt_too_long"),)] * 4, {}),
    ]
    counts = task.summarise(rows).counts
    assert counts["num_prompt_too_long"] == 1 and counts["num_refused_repeated_prompt"] == 1


def test_10_000_responses_take_less_than_a_gibibyte(tmp_path: Path) -> None:
    """In a process of its own, so that its peak memory is its own; self-BLEU needs 2 samples a prompt."""
    draw = random.Random(0)
    words = [f"word{number}" for number in range(20_000)]
    rows = [
        {"prompt": str(number), "response": " ".join(draw.choices(words, k=150))}
        for number in range(10_000)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    code = (
        "import pathlib; from eval.score import score_file\n"
        f"found = score_file('diversity', pathlib.Path({str(path)!r}), {{'self_bleu_responses': 10}})\n"
        # Not ru_maxrss, which a child inherits from the process that started it.
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print(found['n_responses'], status.split('VmHWM:')[1].split()[0])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    count, kibibytes = map(int, result.stdout.split())
    assert count == 10_000 and kibibytes < 2**20
