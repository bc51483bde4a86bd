"""Small runs with rollouts: a random tiny Llama that learns to say more of some tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from accelerate import Accelerator
from torch import nn

from prefopt.data import PromptSet
from prefopt.data.groups import GroupSource
from prefopt.engines.start import Started, Task, start_engine
from prefopt.model.load import LoadedPolicy
from prefopt.recipe.registry import signal
from prefopt.recipe.schema import EngineSection, Recipe
from prefopt.rollouts import setup as build_rollouts
from prefopt.signals.base import Signal
from prefopt.training.trainer import PreferenceTrainer
from prefopt.types import Candidates, Prompt
from prefopt.wiring import build_trainer
from tests.unit.memory_trainer import VOCABULARY, lora_llama
from tests.unit.tiny_tokenizers import make_tokenizer


class _Shares:
    """Share of a response's tokens that are below ``limit``; ``broken`` prompts cannot be scored."""

    def __init__(self, limit: int, broken: str) -> None:
        self.limit = limit
        self.broken = broken

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        if self.broken and any(self.broken in group.prompt.id for group in groups):
            raise ValueError("this prompt cannot be scored")
        return [
            [sum(token < self.limit for token in ids) / len(ids) for ids in group.ids]
            for group in groups
        ]

    def close(self) -> None:
        """Nothing to free."""


@signal("low_tokens", source="tests")
def low_tokens(*, limit: int = 48, broken: str = "") -> Signal:
    return _Shares(limit, broken)


def random_prompts(count: int, seed: int = 0) -> PromptSet:
    """Prompts of ragged lengths over the tiny vocabulary, each with a response of its own."""
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, VOCABULARY, rng.integers(low, high)).tolist())

    prompts = tuple(
        Prompt(f"prompt-{i}", draw(2, 9), f"prompt {i}", offline_ids=(*draw(2, 7), 2))
        for i in range(count)
    )
    return PromptSet(prompts, (), f"random-{count}-{seed}")


def make_rollout_trainer(
    run_dir: Path,
    prompts: PromptSet,
    *,
    objective: dict[str, Any] | None = None,
    regime: dict[str, Any] | None = None,
    model: nn.Module | None = None,
    is_peft: bool = True,
    pairs: GroupSource | None = None,
    signals: Sequence[dict[str, Any]] = ({"name": "low_tokens"},),
    credit: dict[str, Any] | None = None,
    reference: dict[str, Any] | None = None,
    eval_source: GroupSource | None = None,
    eval_every: int | None = None,
    **settings: Any,
) -> PreferenceTrainer:
    """A one-process trainer fed by rollouts of the HF engine, wired by `prefopt.wiring`."""
    recipe = Recipe.model_validate(
        {
            "model": {"path": "in-memory"},
            "data": {"prompts": [{"path": "in-memory"}], "cache_dir": str(run_dir / "cache")},
            "objective": objective or {"name": "dpo", "beta": 0.1},
            "regime": {
                "name": "rollouts",
                "samples_per_prompt": 4,
                "max_new_tokens": 6,
                **(regime or {}),
            },
            "signals": list(signals),
            "credit": credit,
            "reference": reference,
            "eval": {"every": eval_every},
            "train": {
                "learning_rate": 1e-2,
                "global_batch_size": 4,
                "max_steps": 5,
                "lr_scheduler": "constant",
                "warmup_frac": 0.0,
                **settings,
            },
            "run": {"output_dir": str(run_dir)},
        }
    )
    policy = LoadedPolicy(model if model is not None else lora_llama(), "0" * 64, "tiny", is_peft)
    with mock.patch.object(build_rollouts, "start_engine", _in_this_process):
        return build_trainer(
            recipe,
            pairs,
            eval_source,
            policy,
            Accelerator(cpu=True),
            prompts=prompts,
            tokenizer=make_tokenizer(),
        )


def _in_this_process(section: EngineSection, task: Task) -> Started:
    """The HF engine on a copy of the policy: a process of its own would have to find the model on disk."""
    assert task.training is not None
    return start_engine(
        section, replace(task, training=replace(task.training, separate_process=False))
    )
