"""Weights that no text reaches, under DDP: they stay as they are, and nobody waits for their gradient."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("model_type", "sections"),
    [
        ("gemma3", {"peft": None}),  # a vision tower, never reached
        pytest.param("gemma3", {}, marks=pytest.mark.slow),  # adapters on it
        pytest.param("bart", {"peft": None}, marks=pytest.mark.slow),  # attention to an encoder
    ],
)
def test_two_processes_train_what_text_reaches_as_one_does(
    model_type: str, sections: dict[str, Any], tmp_path: Path
) -> None:
    """Two micro-batches a process and step, so that gradients add up before they are exchanged."""
    tokenizer = make_tokenizer()
    model = tiny_causal_lm(model_type, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = write_pairs(tmp_path / "pairs.jsonl", 16)
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        train = {"num_epochs": 1, "micro_batch_size": 2}
        recipe = tmp_path / name / "recipe.yaml"
        write_recipe(recipe, tmp_path / "model", pairs, train=train, **sections)
        runs.append(tmp_path / name / "run")
    assert main(["train", str(tmp_path / "one" / "recipe.yaml")]) == 0
    done = launch(cpu_config("ddp", 2, tmp_path), "dpo", tmp_path / "two" / "recipe.yaml")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "find_unused_parameters" not in done.stderr
    one, two = (read_metrics(run / "metrics.jsonl") for run in runs)
    for name in ("loss/total", "train/grad_norm"):
        assert_close([r[name] for r in two], [r[name] for r in one], rtol=1e-4, atol=0)
    (file,) = (runs[0] / "final").glob("*.safetensors")
    found, wanted = load_file(runs[1] / "final" / file.name), load_file(file)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor, rtol=1e-2, atol=2e-4)
