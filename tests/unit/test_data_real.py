"""Real sets: published row counts, defects counted by hand, ids from the library's `apply_chat_template`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefopt.data import DataBundle, load_data
from prefopt.recipe.schema import ColumnMap, DataSection, SourceSection
from tests.unit.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer("llama3", add_bos=True)
GENEROUS = 1_000_000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def load(
    cache: Path, path: Path, *, columns: ColumnMap | None = None, **settings: Any
) -> DataBundle:
    section = SourceSection(path=str(path), columns=columns or ColumnMap(), **settings)
    data = DataSection(train=(section,), max_length_tokens=GENEROUS, cache_dir=str(cache))
    return load_data(data, TOKENIZER)


def raw(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file) if ".jsonl" not in path.name else [json.loads(row) for row in file]


def assert_ids_of_template(
    bundle: DataBundle, dialogues: Iterator[tuple[str, list[Any], list[str]]], every: int
) -> None:
    """Every ``every``-th group has the ids the library's own ``apply_chat_template`` gives."""
    by_id = {group.id: group for group in bundle.train}
    wanted = [row for row in dialogues if row[0] in by_id][::every]
    assert len(wanted) > 20
    for name, prompt, sides in wanted:
        group = by_id[name]
        head = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        assert list(group.prompt_ids) == head
        for response, text in zip(group.responses, sides, strict=True):
            turns = [*prompt, {"role": "assistant", "content": text}]
            assert [*group.prompt_ids, *response.ids] == TOKENIZER.apply_chat_template(turns)[
                "input_ids"
            ]


def test_ultrafeedback_loses_4_identical_2_one_sided_and_4_pairs_that_write_an_end_token(
    shared_data: Path, cache: Path
) -> None:
    path = shared_data / "ultrafeedback_1k" / "train.jsonl.gz"
    columns = ColumnMap(
        score_chosen="metadata.score_chosen", score_rejected="metadata.score_rejected"
    )
    bundle = load(cache, path, format="chat", columns=columns)
    assert bundle.reject_counts == {
        "identical": 4, "empty_chosen": 1, "empty_rejected": 1, "control_token": 4,  # </s> in a text
    }  # fmt: skip
    assert len(bundle.train) == 990
    rows = raw(path)
    dialogues = (
        (
            f"{path.name}:{i}",
            [{"role": "user", "content": r["prompt"]}],
            [r["chosen"], r["rejected"]],
        )
        for i, r in enumerate(rows, 1)
    )
    assert_ids_of_template(bundle, dialogues, every=20)
    for group in bundle.train:
        scores = rows[int(group.id.split(":")[1]) - 1]["metadata"]
        expected = [scores["score_chosen"], scores["score_rejected"]]
        assert [r.score for r in group.responses] == expected


def test_dropping_ties_takes_the_pairs_whose_scores_are_equal(
    shared_data: Path, cache: Path
) -> None:
    """111 ties are published; one that is also identical or empty is counted as that, and once."""
    path = shared_data / "ultrafeedback_1k" / "train.jsonl.gz"
    columns = ColumnMap(
        score_chosen="metadata.score_chosen", score_rejected="metadata.score_rejected"
    )
    tied = [row for row in raw(path) if len(set(row["metadata"].values())) == 1]
    assert len(tied) == 111
    usable = [r for r in tied if r["chosen"] and r["rejected"] and r["chosen"] != r["rejected"]]
    bundle = load(cache, path, format="chat", columns=columns, drop_ties=True)
    assert bundle.reject_counts["tie"] == len(usable)


def test_hh_transcripts_are_read_with_an_implicit_prompt(shared_data: Path, cache: Path) -> None:
    """Of 2,312 rows 5 part ways before the last answer, and 4 answers are empty (counted by a one-off
    script: text before the last "\\n\\nAssistant:" compared, text after it stripped)."""
    path = shared_data / "hh_rlhf" / "harmless-base_test.jsonl.gz"
    bundle = load(cache, path)
    assert bundle.reject_counts == {"prompts_differ": 5, "empty_chosen": 4}
    assert len(bundle.train) == 2303
    dialogues = ((f"{path.name}:{i}", *_hh(row)) for i, row in enumerate(raw(path), 1))
    assert_ids_of_template(bundle, dialogues, every=40)


def _hh(row: dict[str, str]) -> tuple[list[dict[str, str]], list[str]]:
    """Prompt messages and both answers of an HH row, split by hand."""
    head = row["chosen"].rpartition("\n\nAssistant:")[0].removeprefix("\n\nHuman:")
    turns = []
    for part in head.split("\n\nHuman:"):
        user, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": user.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    sides = [row[side].rpartition("\n\nAssistant:")[2].strip() for side in ("chosen", "rejected")]
    return turns, sides


def test_hh_pairs_with_rewards_keep_the_published_mean_rewards(
    shared_data: Path, cache: Path
) -> None:
    """`expected.json` was computed over all 2,354 rows; the 6 refused ones are added back by hand."""
    path = shared_data / "hh_rlhf" / "lol_helpful_base_with_rewards.jsonl.gz"
    columns = ColumnMap(score_chosen="reward_chosen", score_rejected="reward_rejected")
    bundle = load(cache, path, columns=columns)
    assert bundle.reject_counts == {"empty_rejected": 4, "identical": 2}
    assert len(bundle.train) == 2348
    scores = [[r.score for r in group.responses] for group in bundle.train]
    kept = {int(group.id.split(":")[1]) for group in bundle.train}
    rest = [r for i, r in enumerate(raw(path), 1) if i not in kept]
    scores += [[r["reward_chosen"], r["reward_rejected"]] for r in rest]
    published = json.loads((shared_data / "hh_rlhf" / "expected.json").read_text())["helpful_base"]
    means = np.mean(np.array(scores, float), axis=0)
    assert means[0] == pytest.approx(published["mean_reward_chosen"], rel=1e-12)
    assert means[1] == pytest.approx(published["mean_reward_rejected"], rel=1e-12)


def test_sharegpt_pairs_are_read_without_a_column_map(shared_data: Path, cache: Path) -> None:
    path = shared_data / "sharegpt_demo" / "dpo_en_demo.json.gz"
    bundle = load(cache, path)
    assert (len(bundle.train), bundle.reject_counts) == (300, {})
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    dialogues = (
        (
            f"{path.name}:{i}",
            [{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]],
            [row["chosen"]["value"], row["rejected"]["value"]],
        )
        for i, row in enumerate(raw(path), 1)
    )
    assert_ids_of_template(bundle, dialogues, every=10)


def test_long_real_rows_are_counted_by_what_is_too_long(shared_data: Path, cache: Path) -> None:
    path = shared_data / "ultrafeedback_1k" / "eval.jsonl.gz"
    whole = load(cache, path, format="chat").train
    longest = whole.prompt_lengths + whole.response_lengths.max(1)
    section = SourceSection(path=str(path), format="chat")
    data = DataSection(
        train=(section,), max_length_tokens=1500, max_prompt_tokens=500, cache_dir=str(cache)
    )
    counts = load_data(data, TOKENIZER).reject_counts
    assert counts["prompt_too_long"] == (whole.prompt_lengths > 500).sum() > 0
    assert counts["too_long"] == ((whole.prompt_lengths <= 500) & (longest > 1500)).sum() > 0
