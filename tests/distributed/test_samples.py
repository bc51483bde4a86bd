"""Weighted samples on two processes give the single-process run: drawn rows, filtered tokens, ratios, resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefopt.cli import main
from prefopt.training.metrics import read_metrics
from tests.distributed.launch import cpu_config, launch, write_model, write_recipe, write_samples

# Drawn by advantage, so that a step holds some rows twice, and its ratio needs a reference; and a mean over the
# tokens of all samples, some of which have no weight.
CASES: dict[str, dict[str, Any]] = {
    "a_lol": {"objective": {"name": "a_lol", "beta": None}, "sampling": {"name": "advantage"}},
    "filtered_nll": {
        "objective": {"name": "filtered_nll", "beta": None, "threshold": 0.4},
        "sampling": {"name": "uniform"},
    },
}
SCRIPTS = {"a_lol": "a_lol", "filtered_nll": "offline_rl"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_model(directory / "model")
    write_samples(directory / "samples.jsonl", 30)
    return directory


def recipe_of(directory: Path, inputs: Path, case: str) -> Path:
    directory.mkdir(parents=True)
    return write_recipe(
        directory / "recipe.yaml",
        inputs / "model",
        inputs / "samples.jsonl",
        objective=CASES[case]["objective"],
        data={"sampling": CASES[case]["sampling"]},
        train={"num_epochs": 3},
    )


def run(directory: Path, inputs: Path, config: str, processes: int, case: str, *more: str) -> Path:
    recipe = recipe_of(directory, inputs, case)
    done = launch(cpu_config(config, processes, directory), SCRIPTS[case], recipe, *more)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((directory / "run" / "run.json").read_text())["processes"] == processes
    return directory / "run"


@pytest.fixture(scope="module")
def single(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In this process: what is compared is the two processes' run."""
    root = tmp_path_factory.mktemp("single")
    for case in CASES:
        assert main(["train", str(recipe_of(root / case, inputs, case))]) == 0
    return {case: root / case / "run" for case in CASES}


def assert_same_run(got: Path, want: Path) -> None:
    """Same losses, gradient norms, weights of samples and final policy, up to the order of floating-point sums."""
    rows, expected = read_metrics(got / "metrics.jsonl"), read_metrics(want / "metrics.jsonl")
    assert len(rows) == len(expected) > 3
    names = (
        "loss/total",
        "train/grad_norm",
        "weights/mean",
        "weights/effective_frac",
        "samples/reward",
    )
    for row, other in zip(rows, expected, strict=True):
        for name in names:
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), (row["step"], name)
    for file in (want / "final").glob("*.safetensors"):
        ours, theirs = load_file(got / "final" / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize(
    ("config", "case"),
    [
        ("zero3", "a_lol"),
        pytest.param("zero2", "a_lol", marks=pytest.mark.slow),
        pytest.param("ddp", "a_lol", marks=pytest.mark.slow),
        ("zero2", "filtered_nll"),
        pytest.param("zero3", "filtered_nll", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_single_process_run(
    config: str, case: str, inputs: Path, single: dict[str, Path], tmp_path: Path
) -> None:
    """With LoRA, and micro-batches of two rows, so that every rank accumulates."""
    two = run(tmp_path / "two", inputs, config, 2, case, "train.micro_batch_size=2")
    assert_same_run(two, single[case])


@pytest.mark.slow
def test_a_resumed_run_of_two_processes_ends_where_the_single_one_does(
    inputs: Path, single: dict[str, Path], tmp_path: Path
) -> None:
    more = ("train.save_every=2", "train.keep_checkpoints=9")
    two = run(tmp_path / "two", inputs, "zero2", 2, "a_lol", *more)
    for path in (two / "checkpoints").iterdir():
        if path.name != "step-2":
            shutil.rmtree(path)
    shutil.rmtree(two / "final")
    recipe = tmp_path / "two" / "recipe.yaml"
    done = launch(cpu_config("zero2", 2, tmp_path), "a_lol", recipe)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resumed from" in done.stderr
    assert_same_run(two, single["a_lol"])
