"""Rollouts under several processes: the same samples, the same steps, and no process left waiting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prefopt.rollouts.experience import read_log
from prefopt.training.metrics import read_metrics
from tests.distributed.launch import Launched, cpu_config, launch, write_model, write_pairs

PLUGIN = """
from prefopt.recipe.registry import signal
from prefopt.signals.base import per_response

@signal("vowels", source="tests")
def vowels(*, ties: bool = False):
    def score(prompt, text):
        return 0.0 if ties else sum(c in "aeiou" for c in text) / (1 + len(text))
    return per_response(score)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_model(directory / "model")
    write_pairs(directory / "prompts.jsonl", 20)
    (directory / "plugin.py").write_text(PLUGIN)
    return directory


def write_rollout_recipe(path: Path, inputs: Path, **sections: Any) -> Path:
    """Six steps of online DPO; ``sections`` add keys to the defaults."""
    recipe: dict[str, Any] = {
        "model": {"path": str(inputs / "model")},
        "peft": {"type": "lora", "r": 4, "lora_alpha": 8},
        "data": {
            "prompts": [{"path": str(inputs / "prompts.jsonl"), "format": "text"}],
            "cache_dir": str(path.parent / "cache"),
        },
        "objective": {"name": "dpo", "beta": 0.1},
        "regime": {"name": "rollouts", "samples_per_prompt": 3, "max_new_tokens": 6},
        "signals": [{"name": "vowels"}],
        "train": {
            "learning_rate": 1e-2,
            "lr_scheduler": "constant",
            "warmup_frac": 0.0,
            "global_batch_size": 4,
            "max_steps": 6,
        },
        "run": {"output_dir": str(path.parent / "run")},
        "plugins": [str(inputs / "plugin.py")],
    }
    for name, section in sections.items():
        merged = {**recipe.get(name, {}), **section} if isinstance(section, dict) else section
        recipe[name] = merged
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def started(config: str, num_processes: int, recipe: Path, *overrides: str) -> Launched:
    directory = recipe.parent
    return launch(cpu_config(config, num_processes, directory), "online_dpo", recipe, *overrides)


def responses(run_dir: Path) -> dict[tuple[int, int], list[str]]:
    """Token ids of every response, by step and place: whichever process sampled them."""
    return {
        (commit["commit"], group["place"]): [r["ids"] for r in group["responses"]]
        for commit, groups in read_log(run_dir)
        for group in groups
    }


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_rollout_recipe(tmp_path_factory.mktemp("alone") / "recipe.yaml", inputs)
    result = started("cpu", 1, recipe)
    assert result.returncode == 0, result.stderr
    return recipe.parent / "run"


def test_two_ddp_processes_sample_and_train_as_one(
    tmp_path: Path, inputs: Path, alone: Path
) -> None:
    """Each samples half of every step; seeds belong to the request, so the halves make the same whole."""
    recipe = write_rollout_recipe(tmp_path / "recipe.yaml", inputs)
    result = started("ddp", 2, recipe)
    assert result.returncode == 0, result.stderr
    run_dir = tmp_path / "run"
    assert json.loads((run_dir / "run.json").read_text())["processes"] == 2
    assert len(list((run_dir / "rollouts").iterdir())) == 2
    assert responses(run_dir) == responses(alone)
    for row, want in zip(
        read_metrics(run_dir / "metrics.jsonl"), read_metrics(alone / "metrics.jsonl"), strict=True
    ):
        for name in ("loss/total", "train/grad_norm", "rollout/reward", "credit/pairs"):
            assert row[name] == pytest.approx(want[name], rel=1e-4), (row["step"], name)
    ours, theirs = (
        load_file(path / "final" / "adapter_model.safetensors") for path in (run_dir, alone)
    )
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-5)


def test_no_process_hangs_in_a_window_without_pairs(tmp_path: Path, inputs: Path) -> None:
    recipe = write_rollout_recipe(
        tmp_path / "recipe.yaml", inputs, signals=[{"name": "vowels", "ties": True}]
    )
    result = started("ddp", 2, recipe, "train.max_steps=2", "regime.max_lag=1")
    assert result.returncode == 0, result.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["credit/tie_frac"] for row in rows] == [1.0, 1.0]


def test_zero3_names_the_engine_that_can_serve_it(tmp_path: Path, inputs: Path) -> None:
    recipe = write_rollout_recipe(tmp_path / "recipe.yaml", inputs)
    result = started("zero3", 2, recipe)
    assert result.returncode != 0
    assert "vllm_server" in result.stderr
