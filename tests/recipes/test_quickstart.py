"""The quickstart's pieces at toy size: its task, its pairs, its measurements and its verdict."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from prefopt.data import Renderer
from prefopt.recipe.checks import check
from recipes.quickstart import run
from recipes.quickstart.evaluate import (
    Accuracy,
    Change,
    mean_logps,
    preference_accuracy,
    task_accuracy,
)
from recipes.quickstart.prepare import (
    make_model,
    make_tokenizer,
    sft_rows,
    write_base,
    write_jsonl,
)
from recipes.quickstart.sample import build_pairs, generate
from recipes.quickstart.task import NUM_DIGITS, Problem, Splits, make_splits, score_group

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return make_model(tokenizer, seed=0, hidden_size=32).eval()


@pytest.fixture(scope="module")
def splits() -> Splits:
    """As many problems as the quickstart really uses."""
    return make_splits(
        num_sft=run.NUM_SFT,
        num_preference=run.NUM_PREFERENCE,
        num_held_out=run.NUM_HELD_OUT,
        seed=0,
    )


def test_held_out_prompts_are_never_trained_on(splits: Splits) -> None:
    parts = (splits.sft, splits.preference, splits.held_out)
    prompts = [problem.prompt for part in parts for problem in part]
    assert [len(part) for part in parts] == [run.NUM_SFT, run.NUM_PREFERENCE, run.NUM_HELD_OUT]
    assert len(set(prompts)) == sum(map(len, parts))


def test_the_verifier_agrees_with_counting_digits() -> None:
    """Against counts of every digit, not against ``sorted`` once more."""
    draw = random.Random(0)
    for _ in range(300):
        digits = "".join(draw.choices("0123456789", k=NUM_DIGITS))
        right = "".join(digit * digits.count(digit) for digit in "0123456789")
        assert score_group(f"{digits}:", [right, digits[::-1] + "0", right[:-1]]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("wrong", ["", "013578", "00133578 ", " 00133578", "001335788", "83051703"])
def test_only_the_exact_answer_is_right(wrong: str) -> None:
    assert score_group("83051703:", ["00133578", wrong]) == [1.0, 0.0]


def test_a_prompt_of_another_task_is_an_error() -> None:
    with pytest.raises(ValueError, match="digits followed by a colon"):
        score_group("What is 2+2?", ["4"])


def test_the_asked_share_of_demonstrations_is_careless(splits: Splits) -> None:
    """A careless answer writes repeated digits once; every other one is right."""
    rows = sft_rows(splits.sft[:4000], flawed_frac=0.25, seed=1)
    assert Problem("83051703").careless_answer == "013578"
    flawed = 0
    for row in rows:
        if score_group(row["prompt"], [row["response"]]) == [0.0]:
            flawed += 1
            assert row["response"] == "".join(sorted(set(row["prompt"][:-1])))
    # About 1 number in 50 of 8 digits has no repetition, so its careless answer is right: below 0.25.
    standard_error = math.sqrt(0.25 * 0.75 / len(rows))
    assert 0.25 * 0.98 - 3 * standard_error < flawed / len(rows) < 0.25 + 3 * standard_error


def test_a_pair_is_a_right_and_a_wrong_answer_to_one_prompt() -> None:
    prompts = ["21:", "43:", "65:", "87:", "90:"]
    groups = [
        ["21", "12", "12", "11"],  # both kinds
        ["34", "34"],  # all right
        ["65", "6"],  # all wrong
        ["78", ""],  # an empty answer is wrong, and no side of a pair
        ["9", "09"],
    ]
    pairs = build_pairs(prompts, groups, seed=0)
    assert [(row["prompt"], row["chosen"]) for row in pairs.rows] == [("21:", "12"), ("90:", "09")]
    assert pairs.rows[0]["rejected"] in ("21", "11")
    assert pairs.rows[1]["rejected"] == "9"
    assert all(row["score_chosen"] == 1.0 and row["score_rejected"] == 0.0 for row in pairs.rows)
    assert (pairs.num_all_right, pairs.num_all_wrong) == (2, 1)


def test_samples_repeat_with_their_seed_and_keep_their_order(model: Any, tokenizer: Any) -> None:
    prompts = [f"{number:08d}:" for number in (12345678, 5, 90909090, 31415926, 27182818)]
    first, again, other = (
        generate(model, tokenizer, prompts, num_samples=3, temperature=1.0, seed=seed, batch_size=2)
        for seed in (1, 1, 2)
    )
    assert [len(group) for group in first] == [3] * 5
    assert first == again != other
    # Greedy decoding has no seed, so each prompt alone must give what it gave in a batch.
    batched = generate(model, tokenizer, prompts, batch_size=5)
    assert batched == [generate(model, tokenizer, [prompt])[0] for prompt in prompts]


def test_evaluation_and_training_see_the_same_tokens(tokenizer: Any) -> None:
    """The evaluation tokenises by itself; the renderer of training must agree."""
    prompt, response = Renderer(tokenizer).render("83051703:", "00133578")
    assert list(prompt) == tokenizer("83051703:")["input_ids"]
    alone = tokenizer("00133578", add_special_tokens=False)["input_ids"]
    assert list(response) == [*alone, tokenizer.eos_token_id]
    assert tokenizer.decode(response, skip_special_tokens=True) == "00133578"


def test_mean_logps_equal_a_row_by_row_computation(model: Any, tokenizer: Any) -> None:
    rows = [("83051703:", "00133578"), ("12345678:", "1"), ("00000000:", "0000")]
    expected = []
    for prompt, response in rows:
        start = tokenizer(prompt)["input_ids"]
        tail = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([start + tail])).logits[0].log_softmax(-1)
        steps = [logps[len(start) - 1 + i, token].item() for i, token in enumerate(tail)]
        expected.append(sum(steps) / len(steps))
    assert mean_logps(model, tokenizer, rows) == pytest.approx(expected, rel=1e-5)


def test_accuracies_count_what_their_names_say(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, sides = "83051703:", ("00133578", "013578")
    worse, better = sorted(
        sides, key=lambda side: mean_logps(model, tokenizer, [(prompt, side)])[0]
    )
    for chosen, rejected, expected in (
        (better, worse, 1.0),
        (worse, better, 0.0),
        (worse, worse, 0.0),
    ):
        pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}  # a tie is not a win
        assert preference_accuracy(model, tokenizer, [pair], label="") == Accuracy(expected, 1)
    answers = {"21:": "12", "43:": "43", "65:": "56", "87:": "7"}
    monkeypatch.setattr(
        "recipes.quickstart.evaluate.generate",
        lambda model, tokenizer, prompts, **_: [[answers[prompt]] for prompt in prompts],
    )
    right = task_accuracy(model, tokenizer, list(answers), label="")
    assert (right.value, right.count) == (0.5, 4)
    assert right.standard_error == pytest.approx(0.25)  # sqrt(0.5 * 0.5 / 4)


@pytest.mark.parametrize(("after", "verdict"), [(0.56, False), (0.57, True), (0.44, False)])
def test_two_standard_errors_decide(after: float, verdict: bool) -> None:
    """At n = 1000 and p near 0.5: sqrt(2 * 0.25 / 1000) = 0.0224, so the bar is 0.52 + 0.0447."""
    change = Change(Accuracy(0.52, 1000), Accuracy(after, 1000))
    assert change.is_improvement is verdict


@pytest.mark.parametrize(("task_after", "status"), [(0.9, 0), (0.5, 1)])
def test_the_report_fails_when_one_number_did_not_improve(
    task_after: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=100)
    monkeypatch.setattr(run, "RUN_DIR", tmp_path)
    monkeypatch.setattr(run, "console", console)
    before = {"task": Accuracy(0.5, 400), "preference": Accuracy(0.6, 300)}
    after = {"task": Accuracy(task_after, 400), "preference": Accuracy(0.9, 300)}
    assert run.report(before, after, {"sft": 1.5, "simpo": 2.0}, num_pairs=7) == status
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["task_accuracy"] == {
        "before": 0.5,
        "before_se": 0.025,
        "after": task_after,
        "after_se": pytest.approx(math.sqrt(task_after * (1 - task_after) / 400)),
        "count": 400,
    }
    assert summary["preference_accuracy"]["after"] == 0.9
    assert summary["seconds"] == {"sft": 1.5, "simpo": 2.0, "total": 3.5}
    assert summary["versions"]["torch"]
    shown = console.export_text()
    assert str(tmp_path / "simpo") in shown
    assert ("no improvement beyond two standard errors: task_accuracy" in shown) == bool(status)


def test_both_recipes_pass_the_check_once_their_data_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tmp_path / run.RUN_DIR
    write_base(base / "base", seed=0)
    write_jsonl(base / "data" / "sft.jsonl", sft_rows([Problem("1203")], flawed_frac=0, seed=0))
    row = {"prompt": "1203:", "chosen": "0123", "rejected": "1203"}
    for name in ("pairs.jsonl", "held_out_pairs.jsonl"):
        write_jsonl(base / "data" / name, [row])
    assert json.loads((base / "data" / "pairs.jsonl").read_text()) == row
    check(ROOT / "recipes" / "quickstart" / "sft.yaml")
    write_base(base / "sft" / "final", seed=0)  # which simpo.yaml starts from
    check(ROOT / "recipes" / "quickstart" / "simpo.yaml")


def test_the_base_model_is_the_same_for_the_same_seed(tokenizer: Any) -> None:
    first, again, other = (make_model(tokenizer, seed=seed) for seed in (3, 3, 4))
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
