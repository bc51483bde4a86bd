"""An in-memory `GroupSource`, and a trainer over it: what the unit tests train with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn

from prefopt.config.schema import TrainSection
from prefopt.layouts import build_logp_model
from prefopt.optim import build_optimizer
from prefopt.reference import ReferenceStore
from prefopt.reference_pass import ReferenceLogps, fill_store
from prefopt.regimes import OfflineRegime, SplitLimits
from prefopt.registry import bind_objective
from prefopt.trainer import PreferenceTrainer
from prefopt.types import Group, Response
from tests.unit.tiny_models import tiny_model

VOCABULARY = 97


class MemorySource:
    """Groups in a list, behind the interface of `data.TokenSet`."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self.prompt_lengths = np.array([len(g.prompt_ids) for g in self.groups])
        self.response_lengths = np.array([[len(r.ids) for r in g.responses] for g in self.groups])
        self.fingerprint = hashlib.sha256(repr(self.groups).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.groups)

    def group(self, index: int) -> Group:
        return self.groups[index]


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
    source: MemorySource,
    *,
    objective: dict[str, Any],
    model: nn.Module | None = None,
    eval_source: MemorySource | None = None,
    layout: str = "auto",
    **settings: Any,
) -> PreferenceTrainer:
    """A one-process trainer in ``run_dir``, wired as `prefopt.build` wires it."""
    train = TrainSection(
        **{"learning_rate": 1e-3, "global_batch_size": 8, "log_every": 1, **settings}
    )
    accelerator = Accelerator(cpu=True)
    engine = build_logp_model(model if model is not None else lora_llama(), layout)
    limits = SplitLimits(train.micro_batch_tokens, train.micro_batch_size, engine.packed)
    regime = OfflineRegime(
        source,
        global_batch_size=train.global_batch_size,
        limits=limits,
        seed=train.seed,
        num_epochs=train.num_epochs,
        max_steps=train.max_steps,
    )
    prepared, optimizer = accelerator.prepare(engine, build_optimizer(engine, train))
    bound = bind_objective(objective)
    reference = None
    if bound.needs_reference:
        store = ReferenceStore(run_dir / "cache", "0" * 64)
        reference = ReferenceLogps(store.directory, is_initial_policy=True)
        for data in filter(None, (source, eval_source)):
            fill_store(store, prepared, data, range(len(data)), limits, accelerator)
            reference.load(store, data.groups)
    return PreferenceTrainer(
        prepared,
        optimizer,
        objective=bound,
        regime=regime,
        settings=train,
        accelerator=accelerator,
        run_dir=run_dir,
        limits=limits,
        reference=reference,
        eval_source=eval_source,
    )


def trained_weights(trainer: PreferenceTrainer) -> dict[str, torch.Tensor]:
    """Copies of the trainable weights."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
