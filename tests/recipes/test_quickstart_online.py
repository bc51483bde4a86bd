"""The online quickstart at toy size: its verifier in a real run, its measurements and its verdict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from prefopt.recipe.checks import check
from prefopt.recipe.load import load_recipe
from prefopt.recipe.registry import get_signal
from prefopt.rollouts.experience import read_log
from prefopt.training.metrics import read_metrics
from prefopt.types import Candidates, Prompt
from prefopt.wiring import train
from recipes.quickstart import online, run
from recipes.quickstart.evaluate import Accuracy
from recipes.quickstart.prepare import EOS, make_model, make_tokenizer
from recipes.quickstart.task import Problem, make_splits, score_group

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart" / "online.yaml"
NUM_FITTING_STEPS = 120


def half_right_policy(problems: Sequence[Problem]) -> Any:
    """A tiny model that knows these problems by heart, each with its right and its careless answer."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=0, hidden_size=32)
    rows = [(p.prompt, answer) for p in problems for answer in (p.answer, p.careless_answer)]
    texts = [prompt + answer + EOS for prompt, answer in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, : len(problems[0].prompt) + 1] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(NUM_FITTING_STEPS):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a policy that is sometimes right, and prompts, where online.yaml looks."""
    directory = tmp_path_factory.mktemp("online")
    splits = make_splits(num_sft=0, num_preference=16, num_held_out=0, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        online.write_prompts(splits)
    model, tokenizer = half_right_policy(splits.preference)
    final = directory / run.RUN_DIR / "sft" / "final"
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    return directory


@pytest.fixture(scope="module")
def trained(directory: Path) -> Path:
    """The run directory of two steps of the shipped recipe on 8 prompts each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        return directory / train(RECIPE, ["train.global_batch_size=8", "train.log_every=1"])


def test_the_shipped_recipe_passes_the_check_from_any_directory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    check(RECIPE)


def test_the_signal_is_the_tasks_own_program(directory: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        check(RECIPE)  # imports the plugin
    texts = ("00133578", "013578", "83051703", "")
    found = (
        get_signal("sorted_digits")
        .fn()
        .score([Candidates(Prompt("0", (1,), "83051703:"), texts, ((1,),) * 4, (False,) * 4)])
    )
    assert found == [[1.0, 0.0, 0.0, 0.0]]


def test_every_response_of_the_run_is_logged_with_the_programs_score(trained: Path) -> None:
    batches = list(read_log(trained))
    assert [commit["commit"] for commit, _ in batches] == [0, 1]
    rows = (trained.parent / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(row)["prompt"] for row in rows]
    seen, rewards = [], []
    for _, groups in batches:
        for group in groups:
            prompt = prompts[group["row"]]
            texts = [response["text"] for response in group["responses"]]
            assert group["rewards"] == score_group(prompt, texts)
            assert len(texts) == 4
            seen.append(prompt)
            rewards += group["rewards"]
    assert sorted(seen) == sorted(prompts)  # one epoch: every prompt once
    assert 0.1 < sum(rewards) / len(rewards) < 0.9  # there was something to tell apart


def test_the_reward_curve_is_of_the_runs_own_metrics(trained: Path) -> None:
    rows = read_metrics(trained / "metrics.jsonl")
    logged = [sum(map(sum, (g["rewards"] for g in groups))) / 32 for _, groups in read_log(trained)]
    assert online.reward_curve(rows) == [(1, logged[0]), (2, logged[1])]


def test_the_curve_averages_equal_stretches() -> None:
    rows = [{"step": step, "rollout/reward": float(step)} for step in range(1, 8)]
    rows.append({"step": 7, "eval/loss": 0.0})  # a row without rollouts
    assert online.reward_curve(rows, points=3) == [(3, 2.0), (6, 5.0), (7, 7.0)]
    bars = Console(record=True, width=100)
    bars.print(online.curve_table([(3, 0.5)]))
    assert "█" * 20 in bars.export_text() and "█" * 21 not in bars.export_text()


@pytest.mark.parametrize(("after", "status"), [(0.9, 0), (0.5, 1)])
def test_the_exit_code_says_whether_accuracy_improved(
    after: float, status: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=120)
    for module in (online, run):
        monkeypatch.setattr(module, "console", console)
    monkeypatch.setattr(online, "RUN_DIR", tmp_path)
    shutil.copytree(trained, tmp_path / online.TRAINING)
    assert online.report(Accuracy(0.5, 400), Accuracy(after, 400), {"online": 1.5}) == status
    shown = console.export_text()
    assert f"prefopt show {tmp_path / online.TRAINING} --rollouts" in shown
    assert str(tmp_path / online.TRAINING / "rollouts") in shown
    assert ("no improvement beyond two standard errors" in shown) == bool(status)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [point["step"] for point in summary["reward"]] == [1, 2]
    assert summary["task_accuracy"]["after"] == after


@pytest.mark.parametrize(("seed", "made"), [(0, True), (1, False)])
def test_an_earlier_policy_is_taken_only_if_this_seed_made_it(
    seed: int, made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "RUN_DIR", tmp_path)
    monkeypatch.chdir(ROOT)
    assert not run.has_policy(seed)
    recipe = load_recipe(run.SFT_RECIPE, ["train.seed=0", "data.seed=0"])
    (tmp_path / "sft" / "final").mkdir(parents=True)
    (tmp_path / "sft" / "final" / "config.json").write_text("{}")
    record = {"recipe": recipe.model_dump(mode="json")}
    record["recipe"]["train"]["precision"] = (
        "fp32"  # the recipe says `auto`, and the run what that was
    )
    (tmp_path / "sft" / "run.json").write_text(json.dumps(record))
    assert run.has_policy(seed) is made
