"""Real rewards, start to end: HH's helpful dialogues as weighted samples through the A-LoL family.

The rewards are those of the A-LoL authors' reward model. The value of a prompt is here the mean reward of its two
responses (the pipeline stage `advantage` with the rule group_mean), so that exactly the worse side of every pair
without a tie has a negative advantage. The policy is the one-layer Llama of test_real_pairs.py: what is shown is
that the whole way from rewards to a trained policy holds together, not that such a model becomes more helpful.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.cli import main
from prefopt.model.collate import make_batch, response_mask
from prefopt.model.load import load_tokenizer
from prefopt.recipe.load import load_recipe
from prefopt.rollouts.setup import load_run_data
from prefopt.training.metrics import read_metrics
from prefopt.types import ResponseLogps
from tests.recipes.test_real_pairs import raw_rows, write_policy

FILE = "hh_rlhf/lol_helpful_base_with_rewards.jsonl.gz"
COLUMNS = {"score_chosen": "reward_chosen", "score_rejected": "reward_rejected"}
BY_ADVANTAGE = ["a_lol", "a_lol_seq", "a_lol_kl", "a_lol_ref_free"]
BY_REWARD = ["r_lol", "wbc", "r_gold", "rwr", "filtered_nll", "reward_conditioned"]
# The others go the same way, and test_weighted_objectives.py tells them apart.
FAST = {"a_lol", "r_lol", "reward_conditioned"}
VALUES = {"a_lol_kl": {"beta": 0.05}, "filtered_nll": {"threshold": 0.5}}
EXAMPLES = 64
"""Pairs trained on: 12 steps of 16 samples."""


@pytest.fixture(scope="module")
def workshop(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, and samples with advantages made by `prefopt data build` of the whole file."""
    root = tmp_path_factory.mktemp("samples")
    write_policy(root / "policy", shared_data / FILE, 512, 0)
    source = {"path": str(shared_data / FILE), "format": "chat", "columns": COLUMNS}
    stages = [
        {"stage": "rated", "sources": [source]},
        {"stage": "advantage", "rule": {"name": "group_mean", "keep_degenerate": True}},
    ]
    pipeline = root / "pipeline.yaml"
    pipeline.write_text(yaml.safe_dump({"output_dir": str(root / "data"), "stages": stages}))
    assert main(["data", "build", str(pipeline)]) == 0
    return root


def write_recipe(root: Path, data: Path, name: str) -> Path:
    """Twelve steps; held out are some of the prompts."""
    by_advantage = name in BY_ADVANTAGE
    source: dict[str, Any] = {"path": str(root / "data" / "advantage"), "format": "chat"}
    if not by_advantage:
        source = {"path": str(data / FILE), "format": "chat", "columns": COLUMNS}
    scaling = "none" if by_advantage else "z_score" if name in BY_REWARD[3:] else "sigmoid"
    sampling = "advantage" if by_advantage else "reward" if name == "r_lol" else "uniform"
    recipe = {
        "model": {"path": str(root / "policy")},
        "data": {
            "train": [{**source, "max_rows": EXAMPLES * (1 + by_advantage)}],
            "eval_frac": 0.25,
            "max_length_tokens": 512,
            "normalize_rewards": scaling,
            "sampling": {"name": sampling},
            "cache_dir": str(root / "cache"),
        },
        "objective": {"name": name, **VALUES.get(name, {})},
        "train": {
            "learning_rate": 3e-3,
            "global_batch_size": 16,
            "micro_batch_tokens": 2048,
            "max_steps": 12,
            "warmup_frac": 0.0,
        },
        "run": {"output_dir": str(root / name)},
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_the_pipelines_samples_hold_the_files_rewards_and_half_negative_advantages(
    workshop: Path, shared_data: Path
) -> None:
    expected = json.loads((shared_data / "hh_rlhf" / "expected.json").read_text())["helpful_base"]
    shards = sorted((workshop / "data" / "advantage").glob("*.jsonl"))
    rows = [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]
    refused = 2 + 4  # identical and empty sides: tests/recipes/test_real_pairs.py
    assert len(rows) == 2 * (expected["rows"] - refused)
    sides = {side: [r for r in rows if r["id"].endswith(f"#{side}")] for side in (0, 1)}
    for side, name in ((0, "chosen"), (1, "rejected")):
        mean = np.mean([row["reward"] for row in sides[side]])
        # Six rows of 2,354 are gone, whose rewards lie within a few units of the mean.
        assert mean == pytest.approx(expected[f"mean_reward_{name}"], abs=0.01)
    negative = np.mean([row["advantage"] < 0 for row in rows])
    ties = sum(row["advantage"] == 0 for row in rows) / 2
    assert negative == pytest.approx(0.5 * (1 - ties / len(sides[0])))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST else pytest.mark.slow)
        for name in (*BY_ADVANTAGE, *BY_REWARD)
    ],
)
def test_a_family_member_trains_on_real_rewards_and_says_what_it_did(
    workshop: Path, shared_data: Path, name: str
) -> None:
    """Held-out text becomes likelier, and with it falls every loss whose weights do not move with the policy."""
    assert main(["train", str(write_recipe(workshop, shared_data, name))]) == 0
    run = workshop / name
    rows, record = read_metrics(run / "metrics.jsonl"), json.loads((run / "run.json").read_text())
    before, after = (row for row in rows if "eval/loss/total" in row)
    assert after["eval/logps/sample_per_token"] > before["eval/logps/sample_per_token"] + 0.1
    if name in ("a_lol_ref_free", "wbc", "rwr", "filtered_nll", "reward_conditioned"):
        assert after["eval/loss/total"] < before["eval/loss/total"]
    labels, first = record["data"]["labels"], rows[1]
    assert labels["rewards"]["min"] < labels["rewards"]["mean"] < labels["rewards"]["max"]
    if name in BY_ADVANTAGE:
        sampling = record["data"]["sampling"]
        # Half of them, but for single sides that are too long.
        assert labels["advantages"]["negative_frac"] == pytest.approx(0.5, abs=0.03)
        assert record["steps"] == round(12 * sampling["drawable_frac"]) < 12
        assert first["samples/negative_advantage_frac"] == 0 < first["samples/advantage"]
        assert first["weights/positive_frac"] == 1
    else:
        assert record["steps"] == 12
        assert record["data"]["rewards_scaled"]["name"] in ("sigmoid", "z_score")
    if name in ("r_lol", "a_lol"):
        assert first["ratio/mean"] == pytest.approx(
            1, abs=1e-4
        )  # step 0: the policy is its reference


def test_the_loss_of_a_row_is_that_of_a_plain_forward(workshop: Path, shared_data: Path) -> None:
    """The file's first row by hand: transformers' template and logits, σ(R) Σ max(π_t, 0.1) · -log π_t."""
    tokenizer = AutoTokenizer.from_pretrained(workshop / "policy")
    model = AutoModelForCausalLM.from_pretrained(workshop / "policy")
    first = next(row for row in raw_rows(shared_data / FILE))
    turns = [*first["prompt"], {"role": "assistant", "content": first["chosen"]}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
    head = tokenizer.apply_chat_template(
        first["prompt"], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = len(tokenizer(head, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logps = (
            model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[start - 1 :, 0]
        )
    by_hand = (logps.exp().clamp(min=0.1) * -logps).sum() * torch.tensor(
        first["reward_chosen"]
    ).sigmoid()

    path = write_recipe(workshop, shared_data, "r_gold")
    recipe = load_recipe(path, ["data.eval_frac=0.0"])
    source = load_run_data(recipe, load_tokenizer(recipe.model)).train
    assert source is not None
    group = source.group(0)
    batch = make_batch([group])
    lp = ResponseLogps(
        logps[None], response_mask(batch), batch.pairs, rewards=batch.rewards, samples=batch.samples
    )
    assert recipe.objective is not None
    losses = recipe.objective(lp).sample_losses
    torch.testing.assert_close(losses[0], by_hand)
