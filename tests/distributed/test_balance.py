"""The balancing loss of a mixture of experts on two processes: one of each forward, whoever runs it.

What can be equal: with the same forwards, everything. A product of two means is no sum over rows, so a batch in
two forwards has another number than in one; which forwards there are is a question of the split and not of the
launch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from prefopt.cli import main
from prefopt.training.metrics import read_metrics
from tests.distributed.launch import cpu_config, launch, write_pairs, write_recipe
from tests.unit.every_causal_lm import tiny_causal_lm
from tests.unit.tiny_tokenizers import make_tokenizer

COEFFICIENT = 0.5  # so that a fault in it shows in the loss and the gradient
KINDS: dict[str, dict[str, Any]] = {
    "dpo": {"peft": None},
    "dpo, adapter": {},
    "dpo, checkpointed": {"peft": None, "train": {"gradient_checkpointing": True}},
    "sft": {"peft": None, "stage": "sft", "objective": None},
    "reward_model": {"peft": None, "stage": "reward_model", "objective": None},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts that ask for the loss, and 15 pairs: of the last 7, one process has a forward less."""
    directory = tmp_path_factory.mktemp("balance")
    tokenizer = make_tokenizer()
    asks = {"router_aux_loss_coef": COEFFICIENT, "output_router_logits": True}
    tiny_causal_lm("mixtral", vocab_size=len(tokenizer), **asks).save_pretrained(
        directory / "model"
    )
    tokenizer.save_pretrained(directory / "model")
    write_pairs(directory / "pairs.jsonl", 15)
    return directory


def recipe_of(directory: Path, inputs: Path, kind: str, pairs: Path, **train: Any) -> Path:
    directory.mkdir()
    columns = {"columns": {"rejected": None}} if kind == "sft" else {}
    sections = {
        **KINDS[kind],
        "train": {"num_epochs": 1, **train, **KINDS[kind].get("train", {})},
        "data": {"train": [{"path": str(pairs), **columns}]},
    }
    stage = sections.pop("stage", "preference")
    path = write_recipe(directory / "recipe.yaml", inputs / "model", pairs, **sections)
    path.write_text(f"{path.read_text()}stage: {stage}\n")
    return path


def assert_same_run(got: Path, want: Path) -> None:
    rows, wanted = (read_metrics(run / "metrics.jsonl") for run in (got, want))
    for name in ("loss/router_balance", "loss/total", "train/grad_norm"):
        # fp32 sums in another order: measured up to 4e-6 after two steps.
        assert_close([r[name] for r in rows], [r[name] for r in wanted], rtol=1e-4, atol=0)
    for file in (want / "final").glob("*.safetensors"):
        found, tensors = load_file(got / "final" / file.name), load_file(file)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            # Adam moves a weight whose gradient is rounding by as much as any other: 1e-3 a step here.
            assert_close(found[name], tensor, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("ddp", "dpo"),
        pytest.param("ddp", "sft", marks=pytest.mark.slow),
        pytest.param("ddp", "reward_model", marks=pytest.mark.slow),
        pytest.param("zero1", "dpo", marks=pytest.mark.slow),
        pytest.param("zero2", "dpo", marks=pytest.mark.slow),
        pytest.param("zero2", "sft", marks=pytest.mark.slow),
        pytest.param("zero3", "dpo", marks=pytest.mark.slow),
        pytest.param("zero3", "dpo, adapter", marks=pytest.mark.slow),
        pytest.param("zero3", "dpo, checkpointed", marks=pytest.mark.slow),
        pytest.param("zero3", "reward_model", marks=pytest.mark.slow),
    ],
)
def test_with_the_same_forwards_two_processes_give_the_run_of_one(
    config: str, kind: str, inputs: Path, tmp_path: Path
) -> None:
    """One row a forward, which is the same split on any number of processes.

    A ZeRO-3 run must also end: its fused experts are read back by one process alone.
    """
    script = {"sft": "sft", "reward_model": "reward_model"}.get(kind, "dpo")
    recipes = [
        recipe_of(tmp_path / name, inputs, kind, inputs / "pairs.jsonl", micro_batch_size=1)
        for name in ("one", "two")
    ]
    assert main(["train", str(recipes[0])]) == 0
    done = launch(cpu_config(config, 2, tmp_path), script, recipes[1])
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads((tmp_path / "two" / "run" / "run.json").read_text())
    assert record["processes"] == 2
    assert_same_run(tmp_path / "two" / "run", tmp_path / "one" / "run")


@pytest.mark.slow
def test_half_a_batch_on_each_of_two_processes_is_two_halves_on_one(
    inputs: Path, tmp_path: Path
) -> None:
    """Rows as long as each other, dealt back and forth: the first is there twice, so that the halves agree."""
    prompts, ends = ("red one two", "red two one"), (" cat", " dog")
    texts = [(prompts[0], *ends), (prompts[1], *ends[::-1]), (prompts[0], *ends[::-1])]
    rows = [
        dict(zip(("prompt", "chosen", "rejected"), texts[i], strict=True)) for i in (0, 1, 0, 2)
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = {"whole": {}, "halves": {"micro_batch_size": 2}, "two": {}}
    found = {}
    for name, train in runs.items():
        train = {"global_batch_size": 4, "shuffle": False, **train}
        recipe = recipe_of(tmp_path / name, inputs, "dpo", pairs, **train)
        if name == "two":
            done = launch(cpu_config("ddp", 2, tmp_path), "dpo", recipe)
            assert done.returncode == 0, done.stderr[-4000:]
        else:
            assert main(["train", str(recipe)]) == 0
        (found[name],) = read_metrics(tmp_path / name / "run" / "metrics.jsonl")
    assert_same_run(tmp_path / "two" / "run", tmp_path / "halves" / "run")
    whole, halves = (found[name]["loss/router_balance"] for name in ("whole", "halves"))
    assert halves != pytest.approx(whole, rel=1e-4)
