"""The judge of the evaluation quickstart learns from labels that are right, and from no order or length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from transformers import AutoTokenizer

from recipes.quickstart.judge import (
    CHAT_TEMPLATE,
    Comparison,
    comparisons,
    judge_rows,
    write_judge_base,
)
from recipes.quickstart.task import Problem, make_splits


def test_verdicts_by_hand() -> None:
    problem = Problem("51706741")
    assert Comparison(problem, "01145677", "0145677").verdict == "[[A]]"
    assert Comparison(problem, "014567", "01145677").verdict == "[[B]]"
    assert Comparison(problem, "014567", "0145677").verdict == "[[C]]"  # both wrong
    assert Comparison(problem, "a", "b").prompt == "51706741:a|b>"
    assert Comparison(problem, "a", "b").swapped.prompt == "51706741:b|a>"


def test_both_orders_are_as_frequent() -> None:
    splits = make_splits(num_sft=4000, num_preference=1, num_held_out=1, seed=0)
    counts = Counter(row["response"] for row in judge_rows(comparisons(splits.sft, seed=0)))
    assert abs(counts["[[A]]"] - counts["[[B]]"]) < 4 * (counts["[[A]]"] + counts["[[B]]"]) ** 0.5
    assert 0.05 < counts["[[C]]"] / 4000 < 0.3


def test_the_judge_reads_a_chat_as_it_read_its_training_rows(tmp_path: Path) -> None:
    write_judge_base(tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = Comparison(Problem("51706741"), "0145677", "01145677").prompt
    chat = [{"role": "user", "content": prompt}]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert (
        tokenizer(rendered, add_special_tokens=False)["input_ids"] == tokenizer(prompt)["input_ids"]
    )
    assert tokenizer.pad_token_id not in tokenizer(f"{prompt}[[A]][[B]][[C]]")["input_ids"]
