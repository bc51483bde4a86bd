"""Adapters through the command line: what trains nothing is refused or stopped; trained tokens go all the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.commands import Prefopt

LORA = "peft={type: lora, r: 4, lora_alpha: 8, "


def test_check_names_the_key_and_what_to_use_instead(command: Prefopt, recipe: Path) -> None:
    said = command.refuses("check", recipe, "peft.alora_invocation_tokens=[3]")
    assert "peft.alora_invocation_tokens = [3]: activated LoRA acts only after these tokens" in said
    assert "Leave it out: plain LoRA acts on every token" in said


def test_check_names_a_type_that_needs_more_than_its_layers(command: Prefopt, recipe: Path) -> None:
    said = command.refuses("check", recipe, "peft={type: poly, r: 4}")
    assert "peft.type = 'poly': needs the id of a task with every row" in said


def test_check_reads_a_saved_adapters_own_settings(
    command: Prefopt, recipe: Path, tmp_path: Path
) -> None:
    saved = {"peft_type": "LORA", "alora_invocation_tokens": [3]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    said = command.refuses("check", recipe, f"peft={{adapter: {tmp_path}}}")
    assert "was made with alora_invocation_tokens = [3]: activated LoRA acts only after" in said


def test_trained_tokens_are_trained_saved_and_merged(
    command: Prefopt, recipe: Path, tmp_path: Path
) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    tokens = LORA + "target_modules: [q_proj], trainable_token_indices: [3, 4]}"
    said = command("train", recipe, tokens, f"run.output_dir={run}", "train.learning_rate=0.1")
    assert said[0] == 0, said[1]
    saved = load_file(run / "final" / "adapter_model.safetensors")
    rows = next(value for name, value in saved.items() if "trainable_tokens" in name)
    assert rows.shape[0] == 2
    assert command("merge", run, "--output", merged)[0] == 0


def test_a_run_whose_gradient_never_arrives_stops(
    command: Prefopt, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an adapter that never applies: the objective asks, and the weights hear nothing."""
    from peft.tuners.lora.layer import Linear

    def never_applied(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.base_layer(x) + sum(0.0 * p.sum() for p in self.parameters() if p.requires_grad)

    monkeypatch.setattr(Linear, "forward", never_applied)
    run = tmp_path / "run"
    steps = ("train.num_epochs=4", "train.global_batch_size=2", f"run.output_dir={run}")
    said = command.refuses("train", recipe, *steps, code=1)
    assert "step 3: the gradient is exactly 0 for 3 steps in a row" in said
    assert "Look at the peft section" in said
    assert not (run / "final").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row.get("train/grad_norm", 0.0) == 0.0 for row in rows)
