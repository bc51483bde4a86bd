"""Random pairs in memory and a trainer over them: what the unit tests train with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn

from prefopt.data.groups import GroupList
from prefopt.model.load import LoadedPolicy
from prefopt.recipe.schema import Recipe
from prefopt.training.trainer import PreferenceTrainer
from prefopt.types import Group, Response
from prefopt.wiring import build_trainer
from tests.unit.tiny_models import tiny_model

VOCABULARY = 97


def random_pairs(count: int, seed: int = 0, longest: int = 12) -> list[Group]:
    """Pairs of ragged lengths over the tiny vocabulary."""
    rng = np.random.default_rng(seed)

    def draw(low: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, VOCABULARY, rng.integers(low, longest)).tolist())

    return [
        Group(f"pair-{i}", draw(1), (Response(draw(2)), Response(draw(2))), ((0, 1),))
        for i in range(count)
    ]


def lora_llama(seed: int = 0) -> nn.Module:
    """A tiny Llama with a freshly initialised LoRA (B = 0), always the same for a seed."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_model("llama", vocab_size=VOCABULARY), config)


def make_trainer(
    run_dir: Path,
    source: GroupList,
    *,
    objective: dict[str, Any] | None,
    stage: str = "preference",
    model: nn.Module | None = None,
    eval_source: GroupList | None = None,
    layout: str = "auto",
    sampling: dict[str, Any] | None = None,
    columns: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    **settings: Any,
) -> PreferenceTrainer:
    """A one-process trainer in ``run_dir``, wired by `prefopt.wiring` over groups in memory."""
    recipe = Recipe.model_validate(
        {
            "stage": stage,
            "model": {"path": "in-memory", "layout": layout},
            "data": {
                "train": [{"path": "in-memory", "columns": columns or {}}],
                "cache_dir": str(run_dir / "cache"),
                "sampling": sampling or {},
            },
            "objective": objective,
            "train": {"learning_rate": 1e-3, "global_batch_size": 8, **settings},
            "eval": evaluation or {},
            "run": {"output_dir": str(run_dir)},
        }
    )
    policy = LoadedPolicy(model if model is not None else lora_llama(), "0" * 64, "tiny", True)
    return build_trainer(recipe, source, eval_source, policy, Accelerator(cpu=True))


def trained_weights(trainer: PreferenceTrainer) -> dict[str, torch.Tensor]:
    """Copies of the trainable weights."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
