"""Several processes, DDP and DeepSpeed, give the single-process run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.commands.export import export_checkpoint
from prefopt.training.metrics import read_metrics
from tests.distributed.launch import (
    accelerate_launch,
    cpu_config,
    launch,
    write_model,
    write_pairs,
    write_recipe,
)

TUNINGS = {"lora": {}, "full": {"peft": None}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and 30 pairs: batches of 8 whose last holds 6."""
    directory = tmp_path_factory.mktemp("inputs")
    write_model(directory / "model")
    write_pairs(directory / "pairs.jsonl", 30)
    return directory


def run(
    directory: Path,
    inputs: Path,
    config: str,
    processes: int,
    tuning: str,
    *overrides: str,
    typed: bool = False,
) -> Path:
    """Trains in ``directory`` and returns the run directory; the launch must have had its processes.

    ``typed``: through `accelerate launch` itself.
    """
    directory.mkdir()
    recipe = write_recipe(
        directory / "recipe.yaml",
        inputs / "model",
        inputs / "pairs.jsonl",
        **TUNINGS[tuning],
    )
    start = accelerate_launch if typed else launch
    done = start(cpu_config(config, processes, directory), "dpo", recipe, *overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads((directory / "run" / "run.json").read_text())
    assert record["processes"] == processes
    return directory / "run"


@pytest.fixture(scope="module")
def single(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("single")
    return {
        tuning: run(root / tuning, inputs, "cpu", 1, tuning, typed=tuning == "lora")
        for tuning in TUNINGS
    }


def assert_same_run(got: Path, want: Path) -> None:
    """Same losses, gradient norms and final weights, up to the order of floating-point sums."""
    rows, expected = read_metrics(got / "metrics.jsonl"), read_metrics(want / "metrics.jsonl")
    assert len(rows) == len(expected) == 8
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss/total", "train/grad_norm", "rewards/margin", "logps/chosen"):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), (row["step"], name)
    assert_same_weights(got, want)


def assert_same_weights(got: Path, want: Path) -> None:
    """Adam moves a weight whose gradient is rounding by as much as any other: 1e-3 a step here."""
    for file in (want / "final").glob("*.safetensors"):
        ours, theirs = load_file(got / "final" / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize(
    ("config", "tuning"),
    [
        ("ddp", "lora"),
        ("zero2", "lora"),
        pytest.param("zero3", "lora", marks=pytest.mark.slow),  # as the resumed run below
        ("zero3", "full"),
    ],
)
def test_two_processes_give_the_single_process_run(
    config: str, tuning: str, inputs: Path, single: dict[str, Path], tmp_path: Path
) -> None:
    """With micro-batches of two pairs, so that every rank accumulates over several backward passes.

    With LoRA through `accelerate launch` itself, once a configuration; elsewhere its processes are forks.
    """
    micro = "train.micro_batch_size=2"
    two = run(tmp_path / "two", inputs, config, 2, tuning, micro, typed=tuning == "lora")
    assert_same_run(two, single[tuning])
    (checkpoint,) = (two / "checkpoints").glob("step-*")
    export_checkpoint(two, checkpoint, tmp_path / "exported")
    for file in (two / "final").glob("*.safetensors"):
        exported, final = load_file(tmp_path / "exported" / file.name), load_file(file)
        assert all(torch.equal(exported[name], tensor) for name, tensor in final.items())


PROBE = "eval.generation={num_prompts: 5, max_new_tokens: 8}"


def test_two_processes_share_the_generation_probe(inputs: Path, tmp_path: Path) -> None:
    """Five prompts over two processes: the same numbers and the same answers as one process has at the start."""
    held_out = f"data.eval=[{{path: {write_pairs(tmp_path / 'held_out.jsonl', 7, seed=1)}}}]"
    one = run(tmp_path / "one", inputs, "cpu", 1, "lora", held_out, PROBE)
    two = run(tmp_path / "two", inputs, "ddp", 2, "lora", held_out, PROBE)
    first, last = (read_metrics(each / "metrics.jsonl") for each in (one, two))
    names = [name for name in first[0] if name.startswith("eval/generation/")]
    assert len(names) == 4
    assert [first[0][name] for name in names] == [last[0][name] for name in names]
    assert set(names) <= set(last[-1])
    answers = [(each / "eval" / "generations-0.jsonl").read_text() for each in (one, two)]
    assert answers[0] == answers[1]


def test_a_probe_of_a_sharded_policy_is_refused(inputs: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", inputs / "model", inputs / "pairs.jsonl")
    done = launch(
        cpu_config("zero3", 2, tmp_path), "dpo", recipe, "data.eval_frac=0.2", PROBE
    )  # fmt: skip
    assert done.returncode != 0
    assert "eval.generation: the policy's parameters are sharded" in done.stderr


def test_launch_that_is_not_what_it_says_is_refused(inputs: Path, tmp_path: Path) -> None:
    """accelerate runs this FSDP configuration as DDP on CPU processes, and says nothing."""
    recipe = write_recipe(tmp_path / "recipe.yaml", inputs / "model", inputs / "pairs.jsonl")
    done = launch(cpu_config("fsdp2", 2, tmp_path), "dpo", recipe)
    assert done.returncode != 0
    assert "asks for FSDP, accelerate set up MULTI_CPU on cpu" in done.stderr


@pytest.mark.parametrize("config", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_resumed_run_of_two_processes_ends_where_the_single_one_does(
    config: str, inputs: Path, single: dict[str, Path], tmp_path: Path
) -> None:
    """Killed after its checkpoint of step 6, whose last file has a flipped byte since: that of step 3 is taken."""
    run(
        tmp_path / "two",
        inputs,
        config,
        2,
        "lora",
        "train.save_every=3",
        "train.keep_checkpoints=9",
    )
    checkpoints = tmp_path / "two" / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step-8")
    *_, flipped = sorted(each for each in (checkpoints / "step-6").rglob("*") if each.is_file())
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    shutil.rmtree(tmp_path / "two" / "run" / "final")
    recipe = tmp_path / "two" / "recipe.yaml"
    done = launch(cpu_config(config, 2, tmp_path), "dpo", recipe)
    assert done.returncode == 0, done.stderr[-4000:]
    name = flipped.relative_to(checkpoints / "step-6")
    assert f"step-6 is damaged ({name} is not what was written" in done.stderr
    assert f"resumed from {checkpoints / 'step-3'}" in done.stderr
    assert_same_run(tmp_path / "two" / "run", single["lora"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("cpu", 1), ("ddp", 2)),
        pytest.param(("ddp", 2), ("cpu", 1), marks=pytest.mark.slow),
        pytest.param(("ddp", 2), ("ddp", 4), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("tuning", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_goes_on_on_another_number_of_processes(
    before: tuple[str, int],
    after: tuple[str, int],
    tuning: str,
    inputs: Path,
    single: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Its checkpoint falls between two rows of metrics.jsonl, whose sums all of them had a part in."""
    more = ("train.save_every=3", "train.keep_checkpoints=9", "train.log_every=2")
    left = run(tmp_path / "run", inputs, *before, tuning, *more)
    for step in (6, 8):
        shutil.rmtree(left / "checkpoints" / f"step-{step}")
    shutil.rmtree(left / "final")
    recipe = tmp_path / "run" / "recipe.yaml"
    done = launch(cpu_config(*after, tmp_path), "dpo", recipe, "train.log_every=2")
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"resumed from {left / 'checkpoints' / 'step-3'}" in done.stderr
    record = json.loads((left / "run.json").read_text())
    assert record["processes"] == after[1]
    rows = {row["step"]: row for row in read_metrics(single[tuning] / "metrics.jsonl")}
    for row in read_metrics(left / "metrics.jsonl"):
        pair = [rows[row["step"] - 1], rows[row["step"]]]
        mean = sum(each["loss/total"] for each in pair) / 2
        assert row["loss/total"] == pytest.approx(mean, rel=1e-4), row["step"]
    assert_same_weights(left, single[tuning])


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_a_reference_of_other_weights_is_whole_on_every_process(
    config: str, inputs: Path, tmp_path: Path
) -> None:
    """ZeRO-3 splits what trains; nobody would gather the reference, which is asked before there is an engine."""
    other = write_model(tmp_path / "other", seed=1)
    reference = f"reference={{name: model, path: {other}}}"
    one = run(tmp_path / "one", inputs, "cpu", 1, "full", reference)
    assert_same_run(run(tmp_path / "two", inputs, config, 2, "full", reference), one)
