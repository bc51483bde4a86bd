"""Published files that `prefopt eval score` reads: numbers, counted problems or errors of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from eval.score import score_file
from prefopt.errors import PrefoptError
from tests.fuzz.mutations import as_json, fuzzed, mutated_value, steps

GAMES = [{"score": "A>B", "judgment": "So: [[A>B]]"}, {"score": "B>A", "judgment": "[[B>A]]"}]
ROWS: dict[str, list[Any]] = {
    "gsm8k": [{"question": "q", "answer": "#### 3", "response": "It is 3.", "model": "m"}],
    "alpaca_eval2": [
        {"instruction": "Made up", "output_1": "a", "output_2": "b", "preference": 1.5, "generator_1": "g",
         "generator_2": "h", "dataset": "d"},
        {"instruction": "Other", "output_1": "a", "output_2": "b", "raw_completion": {"logprobs": {"content": [
            {"top_logprobs": [{"token": "m", "logprob": -0.1}, {"token": "M", "logprob": -2}]}]}}},
    ],
    "arena_hard": [{"question_id": "q", "model": "m", "games": GAMES, "category": "c"}],
    "mt_bench": [{"question_id": 81, "model": "m", "turn": 1, "score": 4, "judgment": "Rating: [[4]]"}],
    "reward_bench": [
        {"id": 1, "subset": "hep-go", "results": 1},
        {"id": 2, "subset": "hep-go", "scores_chosen": [1.5], "scores_rejected": [1.0]},
    ],
    "pair_accuracy": [{"id": "a", "prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 1,
                       "score_rejected": 0.5}],
    "llmbar": [{"i": 1, "label": 1, "completion": "Output (a)", "completion_swapped": "Output (b)",
                "winner": "1"}],
    "ifeval": [
        {"key": 7, "prompt": "A", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"n": None}],
         "response": "none here"},
        {"key": 9, "prompt": "C", "instruction_id_list": ["length_constraints:number_words"],
         "kwargs": [{"num_words": 1, "relation": "at least"}], "response": "word"},
    ],
    "diversity": [{"prompt": "p", "response": "a b c", "model": "m"},
                  {"prompt": "p", "response": "a b d", "model": "m"}],
}  # fmt: skip
DATA: dict[str, list[Any]] = {
    "ifeval": ROWS["ifeval"],
    "mt_bench": [{"question_id": 81, "category": "writing", "turns": ["a", "b"]}],
}
"""What these tasks would otherwise look for in the hub."""


def score(folder: Path, task: str, rows: list[Any]) -> dict[str, Any]:
    path, data = folder / "published.jsonl", folder / f"{task}.jsonl"
    path.write_bytes(b"\n".join(map(as_json, rows)))
    if task in DATA and not data.exists():
        data.write_bytes(b"\n".join(map(as_json, DATA[task])))
    return score_file(task, path, {"data": str(data)} if task in DATA else {})


@pytest.mark.parametrize("task", sorted(ROWS))
def test_the_files_that_are_mutated_are_right(tmp_path: Path, task: str) -> None:
    assert score(tmp_path, task, ROWS[task])["task"] == task


def check(folder: Path, case: tuple[str, list[Any]]) -> None:
    task, rows = case
    try:
        with steps():
            found = score(folder, task, rows)
        json.dumps(found, ensure_ascii=False).encode()
    except PrefoptError as error:
        str(error).encode()


CASE = st.sampled_from(sorted(ROWS)).flatmap(
    lambda task: st.tuples(
        st.just(task),
        st.lists(
            st.one_of(mutated_value(ROWS[task]), st.sampled_from(ROWS[task])),
            min_size=1,
            max_size=3,
        ),
    )
)
test_published, test_many_published = fuzzed(CASE, check, share=0.5)
