"""Pair accuracy: published accuracies, log-probs from models' own logits, calibration against scikit-learn."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from eval.base import Row
from eval.calibration import (
    brier_scores,
    expected_calibration_error,
    log_losses,
    reliability_bins,
)
from eval.models import open_models
from eval.registry import make_task
from eval.score import score_file
from eval.settings import EvalSettings, JudgeSection
from prefopt.errors import ConfigError, DataError, ModelError
from prefopt.recipe.registry import get_signal
from prefopt.recipe.schema import ModelSection
from tests.eval.runs import write_chat_model, write_jsonl
from tests.signals.cases import candidates
from tests.signals.chat_server import Answer, chat_server
from tests.unit.tiny_models import tiny_config
from tests.unit.tiny_tokenizers import make_tokenizer

PAIRS = [
    ("How do I cook rice?", "With water and a pot.", "No."),
    ("Can you help me?", "Sure!", "I am not sure about this, but I think so."),
    ("What is a fox?", "A quick brown animal.", "A dog."),
    ("Is it lazy?", "Yes", "It is"),
]


def chat_pairs(tmp_path: Path, pairs: list[tuple[str, str, str]] = PAIRS) -> Path:
    return write_jsonl(
        tmp_path / "pairs.jsonl",
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for prompt, chosen, rejected in pairs
        ],
    )


def evaluated(
    data: Path, model: Path, baseline: Path | None = None, *, judge: Any = None, **options: Any
) -> tuple[Any, list[Row]]:
    """The task and its rows."""
    task = make_task("pair_accuracy", {"data": str(data), **options})
    settings = EvalSettings(
        model=ModelSection(path=str(model)),
        baseline=None if baseline is None else ModelSection(path=str(baseline)),
        judge=judge,
        device="cpu",
        batch_tokens=100,
    )
    examples = task.examples()
    opened = task.open(open_models(settings))
    try:
        return task, task.rows(examples, opened)
    finally:
        task.close(opened)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``policy`` and ``base``, full models, and ``adapter``, on ``base``."""
    folder = tmp_path_factory.mktemp("saved")
    found = {
        name: write_chat_model(folder / name, seed=seed)
        for seed, name in enumerate(("policy", "base"))
    }
    base: Any = AutoModelForCausalLM.from_pretrained(found["base"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(str(folder / "adapter"))
    return {**found, "adapter": folder / "adapter"}


def own_logps(model: Path, prompt: str, response: str) -> torch.Tensor:
    """(T,) token log-probs of a response from the model's own logits, ended by its turn's end token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    policy: Any = AutoModelForCausalLM.from_pretrained(model)
    start = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    context, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (start, f"{start}{response}<|im_end|>")
    )
    assert whole[: len(context)] == context
    with torch.no_grad():
        logps = policy(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    targets = torch.tensor(whole[len(context) :])
    return logps[len(context) - 1 : -1].gather(-1, targets[:, None])[:, 0]


Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(
    ("options", "score"),
    [
        ({"by": "implicit_reward", "beta": 0.5}, lambda own, ref: 0.5 * (own - ref).sum()),
        ({}, lambda own, ref: 0.1 * (own - ref).sum()),
        ({"average": True, "beta": 2.0}, lambda own, ref: 2.0 * (own - ref).mean()),
        ({"by": "logp", "beta": 1.0}, lambda own, ref: own.sum()),
        ({"by": "mean_logp", "beta": 1.0}, lambda own, ref: own.mean()),
    ],
)
def test_scores_are_sums_and_means_over_the_models_own_log_probs(
    tmp_path: Path, saved: dict[str, Path], options: dict[str, Any], score: Score
) -> None:
    _, rows = evaluated(chat_pairs(tmp_path), saved["policy"], saved["base"], **options)
    for row, (prompt, *sides) in zip(rows, PAIRS, strict=True):
        chosen, rejected = (
            score(
                own_logps(saved["policy"], prompt, side), own_logps(saved["base"], prompt, side)
            ).item()
            for side in sides
        )
        assert row.values["chosen"] == pytest.approx(chosen, abs=1e-4)
        assert row.values["rejected"] == pytest.approx(rejected, abs=1e-4)
        assert row.values["margin"] == pytest.approx(chosen - rejected, abs=2e-4)
        assert row.values["accuracy"] == float(chosen > rejected)
    assert len({row.values["accuracy"] for row in rows}) == 2  # or right and wrong look the same


def test_the_reference_of_an_adapter_is_its_base(tmp_path: Path, saved: dict[str, Path]) -> None:
    data = chat_pairs(tmp_path)
    _, alone = evaluated(data, saved["adapter"])
    _, beside = evaluated(data, saved["adapter"], saved["base"])
    assert alone[0].details["by"] == "implicit_reward"
    for one, other in zip(alone, beside, strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-5)
        assert abs(one.values["margin"] or 0.0) > 1e-3


def test_a_full_model_alone_is_asked_for_its_mean_log_prob(
    tmp_path: Path, saved: dict[str, Path]
) -> None:
    data = chat_pairs(tmp_path)
    _, rows = evaluated(data, saved["policy"])
    _, same = evaluated(data, saved["policy"], by="mean_logp")
    assert rows == same
    with pytest.raises(ConfigError, match="--baseline is missing"):
        evaluated(data, saved["policy"], by="implicit_reward")


def test_a_baseline_with_another_tokenizer_is_refused(
    tmp_path: Path, saved: dict[str, Path]
) -> None:
    other = write_chat_model(tmp_path / "other")
    config = json.loads((other / "tokenizer.json").read_text())
    vocabulary = config["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="tokenizer is not that of"):
        evaluated(chat_pairs(tmp_path), saved["policy"], other)


def test_a_sequence_classifier_is_scored_as_the_reward_model_signal_does(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml", eos_token="<|im_end|>")
    config = tiny_config("llama", len(tokenizer), num_labels=1, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    _, rows = evaluated(chat_pairs(tmp_path), tmp_path / "rm")
    signal = get_signal("reward_model").fn(path=str(tmp_path / "rm"), device="cpu")
    groups = [candidates(*sides, prompt=({"role": "user", "content": p},)) for p, *sides in PAIRS]
    found = [[row.values["chosen"], row.values["rejected"]] for row in rows]
    np.testing.assert_allclose(np.array(found), signal.score(groups), atol=1e-5)
    assert rows[0].details["by"] == "reward_model"
    with pytest.raises(ConfigError, match=r"reward_model\.keep_tails: unknown; did you mean"):
        make_task("pair_accuracy", {"reward_model": {"keep_tails": True}})


def judge_by_length(request: Mapping[str, Any]) -> Answer:
    """Prefers the longer answer, whichever comes first; to "lazy" it always says A."""
    text = request["messages"][0]["content"]
    if "Is it lazy?" in text:
        return Answer("[[A]]")
    a = text.split("<answer_a>\n")[1].split("\n</answer_a>")[0]
    b = text.split("<answer_b>\n")[1].split("\n</answer_b>")[0]
    return Answer("[[A]]" if len(a) > len(b) else "[[B]]")


def test_a_judge_must_prefer_the_chosen_side_in_both_orders(
    tmp_path: Path, saved: dict[str, Path]
) -> None:
    """Chosen is longer in pairs 1 and 3, shorter in 2; in 4 the judge takes what it sees first: a tie."""
    with chat_server(judge_by_length) as server:
        judge = JudgeSection(base_url=server.base_url, model="j", cache_dir=str(tmp_path / "c"))
        task, rows = evaluated(chat_pairs(tmp_path), saved["policy"], judge=judge, by="judge")
    assert [row.values["accuracy"] for row in rows] == [1.0, 0.0, 1.0, 0.0]
    summary = task.summarise(rows)
    assert summary.metrics["accuracy"].value == 50 and summary.counts["n_ties"] == 1
    assert "ece" not in summary.metrics  # points are no log-odds
    assert "prefopt's own template" in summary.notes[0]
    assert len(server.requests) == 8


def test_a_judge_that_is_not_configured_is_asked_for(
    tmp_path: Path, saved: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"judge\.base_url is missing"):
        evaluated(chat_pairs(tmp_path), saved["policy"], by="judge")


def test_pairs_that_training_would_refuse_are_counted_and_not_scored(
    tmp_path: Path, saved: dict[str, Path]
) -> None:
    bad = [("Same?", "Yes", "Yes"), ("Empty?", "Yes", ""), ("Long?", "rice " * 400, "No.")]
    task, rows = evaluated(chat_pairs(tmp_path, [*PAIRS, *bad]), saved["policy"])
    counts = task.summarise(rows).counts
    assert (counts["n"], counts["n_scored"]) == (7, 4)
    assert counts["num_identical"] == counts["num_empty_rejected"] == counts["num_too_long"] == 1


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("lol_helpful_base_with_rewards", "helpful_base"),
        ("lol_sampled_dev_with_rewards", "sampled_dev"),
    ],
)
def test_the_reward_models_published_accuracy_comes_out_of_its_file(
    shared_data: Path, file: str, key: str
) -> None:
    folder = shared_data / "hh_rlhf"
    expected = json.loads((folder / "expected.json").read_text())[key]
    found = score_file("pair_accuracy", folder / f"{file}.jsonl.gz", {})
    assert found["accuracy"] == pytest.approx(100 * expected["reward_model_pairwise_accuracy"])
    assert (found["n"], found["n_ties"]) == (expected["rows"], expected["ties"])
    margin = expected["mean_reward_chosen"] - expected["mean_reward_rejected"]
    assert found["margin"] == pytest.approx(margin)


def test_the_order_of_rows_and_missing_scores_change_nothing_but_the_counts(
    tmp_path: Path, shared_data: Path
) -> None:
    path = shared_data / "hh_rlhf" / "lol_sampled_dev_with_rewards.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    whole = score_file("pair_accuracy", path, {})
    random.Random(0).shuffle(rows)
    broken = [
        {**rows[0], "prompt": "x", "reward_chosen": None},
        {**rows[1], "prompt": "y", "reward_rejected": float("nan")},
    ]
    found = score_file("pair_accuracy", write_jsonl(tmp_path / "r.jsonl", [*rows, *broken]), {})
    assert (found["n"], found["n_scored"], found["num_missing_score"]) == (282, 280, 2)
    for name in ("accuracy", "ece", "brier", "longer_won"):
        assert found[name] == pytest.approx(whole[name])


def test_score_columns_of_other_names_are_named_and_bad_ones_refused(tmp_path: Path) -> None:
    rows = [{"id": i, "good": i, "bad": 1, "model": "m"} for i in range(4)]
    path = write_jsonl(tmp_path / "s.jsonl", rows)
    columns = {"score_chosen": "good", "score_rejected": "bad"}
    found = score_file("pair_accuracy", path, {"columns": columns})
    assert (found["accuracy"], found["n_ties"], found["model"]) == (50, 1, "m")
    with pytest.raises(DataError, match="no columns with the two sides' scores"):
        score_file("pair_accuracy", path, {})
    with pytest.raises(ConfigError, match=r"columns\.score_choosen"):
        score_file("pair_accuracy", path, {"columns": {"score_choosen": "good"}})
    twice = write_jsonl(tmp_path / "t.jsonl", [rows[0], rows[0]])
    with pytest.raises(DataError, match="a second pair with key '0'"):
        score_file("pair_accuracy", twice, {"columns": columns})
    words = write_jsonl(tmp_path / "w.jsonl", [{**rows[0], "good": "high"}])
    with pytest.raises(DataError, match=r"w\.jsonl:1: column 'good' = 'high' is no number"):
        score_file("pair_accuracy", words, {"columns": columns})


@pytest.mark.parametrize(
    ("file", "count", "refused"),
    [
        ("ultrafeedback_1k/eval.jsonl.gz", 200, 1),
        ("sharegpt_demo/dpo_en_demo.json.gz", 300, 0),
        ("hh_rlhf/harmless-base_test.jsonl.gz", 2312, 9),
    ],
)
def test_every_shape_that_training_reads_is_read(
    shared_data: Path, file: str, count: int, refused: int
) -> None:
    """4 of HH's chosen sides are empty and 5 pairs have two prompts; one of UltraFeedback's is identical."""
    examples = make_task("pair_accuracy", {"data": str(shared_data / file)}).examples()
    assert len(examples) == len({example.key for example in examples}) == count
    assert sum(example.fields["refused"] is not None for example in examples) == refused


def test_a_run_brings_the_pairs_it_held_out(tmp_path: Path) -> None:
    data = chat_pairs(tmp_path)
    task = make_task("pair_accuracy")
    with pytest.raises(ConfigError, match="data is missing"):
        task.examples()
    task.adopt_run({"data": {"eval": [{"path": str(data)}]}})
    assert len(task.examples()) == len(PAIRS)
    with pytest.raises(ConfigError, match=r"split = 'test': would be ignored"):
        make_task("pair_accuracy", {"split": "test"})
    with pytest.raises(ConfigError, match=r"eval_frac = 0\.1"):
        make_task("pair_accuracy").adopt_run({"data": {"eval": [], "eval_frac": 0.1}})


def margins(count: int = 500) -> list[float]:
    draw = random.Random(1)
    return [draw.gauss(0.5, 2) for _ in range(count)]


def test_brier_and_log_loss_are_scikit_learns() -> None:
    """There a pair is an event of probability σ(m) that happened; swapping half of them changes nothing."""
    values = np.array(margins())
    sign = np.where(np.arange(len(values)) % 2, 1, -1)
    p, happened = 1 / (1 + np.exp(-sign * values)), (sign > 0).astype(int)
    assert np.mean(brier_scores(values.tolist())) == pytest.approx(brier_score_loss(happened, p))
    assert np.mean(log_losses(values.tolist())) == pytest.approx(log_loss(happened, p))
    assert log_losses([-1000.0, 1000.0]) == [1000.0, 0.0]


def test_reliability_bins_are_scikit_learns() -> None:
    values = np.array(margins())
    right, confidence = values > 0, 1 / (1 + np.exp(-np.abs(values)))
    accuracy, predicted = calibration_curve(
        right, confidence, n_bins=20
    )  # of [0, 1]: ours are the upper half
    bins = reliability_bins(values.tolist())
    assert [each.accuracy for each in bins] == pytest.approx(accuracy)
    assert [each.confidence for each in bins] == pytest.approx(predicted)
    assert sum(each.count for each in bins) == len(values)


def test_expected_calibration_error_by_hand() -> None:
    """σ(±log 3) = 0.75: 3 of 4 right is calibrated, 4 of 4 is 25 points off; a tie is half right of 0.5."""
    m = float(np.log(3)) + 1e-9  # just inside the bin that begins at 0.75
    assert expected_calibration_error(reliability_bins([m, m, m, -m])) == pytest.approx(0, abs=1e-8)
    assert expected_calibration_error(reliability_bins([m] * 4)) == pytest.approx(0.25)
    assert expected_calibration_error(reliability_bins([0.0])) == 0
    mixed = reliability_bins([m] * 4 + [0.0] * 4)
    assert [each.count for each in mixed] == [4, 4]
    assert expected_calibration_error(mixed) == pytest.approx(0.125)


def test_accuracy_is_told_by_length_and_by_the_gap_of_the_labels() -> None:
    task = make_task("pair_accuracy", {"data": "unused"})

    def row(key: int, margin: float, chosen: int, rejected: int, gap: float) -> Row:
        values = {"accuracy": float(margin > 0), "margin": margin}
        details = {"by": "logp", "chosen_chars": chosen, "rejected_chars": rejected}
        return Row(str(key), values, {**details, "scores": [gap, 0.0]})

    rows = [row(0, 1, 10, 5, 1), row(1, -1, 10, 5, 2), row(2, -1, 4, 9, 3), row(3, 0, 3, 9, 3)]
    summary = task.summarise(rows)
    # the longer side won pairs 0 and 2, lost 1, and shares 3
    assert summary.metrics["longer_won"].value == pytest.approx(100 * (1 + 0 + 1 + 0.5) / 4)
    assert summary.metrics["longer_chosen"].value == 50
    assert summary.groups["chosen/rejected length 2-inf"] == {"accuracy": 50, "n": 2}
    assert summary.groups["chosen/rejected length 0-0.5"] == {"accuracy": 0, "n": 2}
    # a third each would part the two gaps of 3: they stay together
    assert summary.groups["label gap 1 to 2"] == {"accuracy": 50, "n": 2}
    assert summary.groups["label gap 3 to 3"] == {"accuracy": 0, "n": 2}
