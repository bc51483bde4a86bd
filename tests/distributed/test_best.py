"""The best step's weights are put back before `final/` is written, however the policy is spread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.commands.export import export_checkpoint
from prefopt.training.metrics import read_metrics
from tests.distributed.launch import cpu_config, launch, write_model, write_pairs, write_recipe


@pytest.mark.slow  # tests/unit/test_best.py is this in one process
@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_the_final_weights_are_those_of_the_best_step(config: str, tmp_path: Path) -> None:
    """Held out are the training pairs the other way round, so every step makes it worse."""
    pairs, held_out = tmp_path / "pairs.jsonl", tmp_path / "held-out.jsonl"
    others = tmp_path / "others.jsonl"
    write_pairs(pairs, 16)
    write_pairs(others, 6, seed=1)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in turned))
    recipe = write_recipe(
        tmp_path / "recipe.yaml", write_model(tmp_path / "model"), pairs,
        data={"eval": [{"path": str(held_out)}, {"path": str(others), "name": "others"}]},
        eval={"every": 1, "best": {"metric": "eval/held-out/loss/total", "mode": "min", "patience": 2}},
    )  # fmt: skip
    done = launch(cpu_config(config, 2, tmp_path), "dpo", recipe)
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "run"
    losses = [row["eval/held-out/loss/total"] for row in read_metrics(run / "metrics.jsonl")]
    assert losses == sorted(losses) and len(losses) == 4
    export_checkpoint(run, run / "checkpoints" / "step-1", tmp_path / "best")
    best = load_file(tmp_path / "best" / "adapter_model.safetensors")
    final = load_file(run / "final" / "adapter_model.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in final.items())
