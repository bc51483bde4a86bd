"""Full fine-tuning of bfloat16 weights on two processes moves them as far as one process in fp32 does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from prefopt.cli import main
from tests.distributed.launch import cpu_config, launch, write_pairs
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import make_tokenizer

STEPS, RATE = 10, 5e-7


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base saved in bfloat16, pairs, and the run of one process in fp32."""
    directory = tmp_path_factory.mktemp("precision")
    tokenizer = make_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).to(torch.bfloat16)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    write_pairs(directory / "pairs.jsonl", 32)
    truth = recipe(directory, "truth", "model.dtype=float32")
    assert main(["train", str(truth)]) == 0
    return directory


def recipe(inputs: Path, name: str, *overrides: str) -> Path:
    """Ten steps of two micro-batches a process and eight pairs in all."""
    sections = {
        "stage": "sft",
        "model": {"path": str(inputs / "model")},
        "data": {
            "train": [{"path": str(inputs / "pairs.jsonl"), "columns": {"rejected": None}}],
            "cache_dir": str(inputs / "cache"),
        },
        "train": {
            "learning_rate": RATE, "global_batch_size": 8, "micro_batch_size": 2,
            "max_steps": STEPS, "warmup_frac": 0.0, "lr_scheduler": "constant",
        },
        "run": {"output_dir": str(inputs / name)},
    }  # fmt: skip
    for override in overrides:
        key, value = override.split("=")
        section, name_ = key.split(".")
        sections[section][name_] = value
    path = inputs / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def moved(inputs: Path, name: str) -> Tensor:
    """How far the masters of a run's last checkpoint are from the start, in fp64."""
    checkpoint = inputs / name / "checkpoints" / f"step-{STEPS}"
    if (checkpoint / "pytorch_model").is_dir():
        found = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="pytorch_model")
    else:
        found = load_file(checkpoint / "model.safetensors")
    start = load_file(inputs / "model" / "model.safetensors")
    return torch.cat(
        [(found[f"model.{n}"].double() - t.double()).flatten() for n, t in start.items()]
    ).detach()


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ("ddp", "auto"),
        pytest.param("zero2", "auto", marks=pytest.mark.slow),
        pytest.param("zero2", "bfloat16", marks=pytest.mark.slow),
        pytest.param("zero1", "auto", marks=pytest.mark.slow),
        pytest.param("zero3", "auto", marks=pytest.mark.slow),
    ],
)
def test_two_processes_move_bfloat16_weights_as_far_as_one_in_fp32(
    inputs: Path, config: str, dtype: str
) -> None:
    """bfloat16 alone moves 1 % of them; the direction is bf16 gradients' (SFT: above 0.97 here)."""
    name = f"{config}-{dtype}"
    done = launch(
        cpu_config(config, 2, inputs), "sft", recipe(inputs, name, f"model.dtype={dtype}")
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found, wanted = moved(inputs, name), moved(inputs, "truth")
    used = wanted.abs() > RATE
    assert (found[used] != 0).double().mean() > 0.999
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.95
    assert (found.norm() / wanted.norm()).item() == pytest.approx(1, abs=0.02)
    saved = load_file(inputs / name / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_bfloat16_by_name_is_refused_where_the_launch_keeps_no_masters(inputs: Path) -> None:
    file = recipe(inputs, "refused", "model.dtype=bfloat16")
    done = launch(cpu_config("ddp", 2, inputs), "sft", file)
    assert done.returncode == 2
    assert "Or launch with DeepSpeed or FSDP" in done.stderr
