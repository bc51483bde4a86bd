"""SFT and reward models: the optimizer steps of TRL's SFTTrainer and RewardTrainer, on the same tokens.

Our side packs, and splits every global batch of eight unevenly; TRL's pads and takes it whole or in equal parts,
on which its loss and gradient norm do not depend.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from prefopt.training.metrics import read_metrics
from prefopt.training.trainer import PreferenceTrainer
from prefopt.types import Group, Response
from tests.parity.recorded_runs import (
    PAD,
    PAIRS_A_STEP,
    SEED,
    ListeningReward,
    ListeningSFT,
    ListeningTurns,
    Recording,
    assert_same_run,
    our_trainer,
    ragged_pairs,
    rows_in_order,
    trl_trainer,
)
from tests.unit.memory_trainer import VOCABULARY
from tests.unit.tiny_models import tiny_model

UNEVEN = {"micro_batch_size": 3}


def record(trainer: PreferenceTrainer, run_dir: Path) -> Recording:
    """Trains to the end; what was fed is taken from the rows of each step."""

    def trainable() -> dict[str, torch.Tensor]:
        named = trainer.model.model.named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    recording = Recording(initial=trainable())
    trainer.train()
    recording.final = trainable()
    rows = read_metrics(run_dir / "metrics.jsonl")
    recording.losses = [row["loss/total"] for row in rows]
    recording.grad_norms = [row["train/grad_norm"] for row in rows]
    fed: list[Any] = [_sequences(group) for group in rows_in_order(trainer)]
    starts = range(0, len(fed), PAIRS_A_STEP)
    recording.pairs = [sorted(fed[start : start + PAIRS_A_STEP]) for start in starts]
    return recording


def _sequences(group: Group) -> tuple[Any, Any]:
    """Tokens without and with loss; of a pair, both sides whole."""
    if not group.pairs:
        ids = group.responses[0].ids
        places = group.responses[0].loss_places
        return (*group.prompt_ids, *np.delete(ids, places)), tuple(np.take(ids, places))
    chosen, rejected = (group.responses[side].ids for side in group.pairs[0])
    return (*group.prompt_ids, *chosen), (*group.prompt_ids, *rejected)


def single_responses() -> list[Group]:
    return [
        dataclasses.replace(group, responses=group.responses[:1], pairs=())
        for group in ragged_pairs()
    ]


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_sft_takes_the_steps_of_trl(micro_batch_size: int, tmp_path: Path) -> None:
    trainer = our_trainer(tmp_path, single_responses(), None, stage="sft", **UNEVEN)
    assert trainer.limits.packed
    rows = rows_in_order(trainer)
    theirs = trl_trainer(ListeningSFT, tmp_path, rows, micro_batch_size=micro_batch_size).record()
    assert_same_run(record(trainer, tmp_path), theirs)


def dialogues() -> list[Group]:
    """Responses of one to three turns with loss, of ragged lengths, and context between them."""
    rng = np.random.default_rng(SEED)

    def masked(group: Group) -> Group:
        ids, mask = [], []
        for turn in range(rng.integers(1, 4)):
            for counts in (False, True)[turn == 0 :]:
                length = rng.integers(2, 9)
                ids += rng.integers(3, VOCABULARY, length).tolist()
                mask += [counts] * int(length)
        return dataclasses.replace(group, responses=(Response(ids, loss_mask=mask),))

    return [masked(group) for group in single_responses()]


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_sft_on_every_turn_takes_the_steps_of_trl(micro_batch_size: int, tmp_path: Path) -> None:
    trainer = our_trainer(tmp_path, dialogues(), None, stage="sft", **UNEVEN)
    rows = rows_in_order(trainer)
    theirs = trl_trainer(ListeningTurns, tmp_path, rows, micro_batch_size=micro_batch_size).record()
    assert_same_run(record(trainer, tmp_path), theirs)


def reward_model(directory: Path, *, lora: bool) -> nn.Module:
    """A tiny Llama with a head, under LoRA or not; always the same."""
    tiny_model("llama", vocab_size=VOCABULARY, pad_token_id=PAD).save_pretrained(directory)
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
    return get_peft_model(model, config) if lora else model


def with_margins(groups: list[Group]) -> list[Group]:
    """The chosen side better by 0, 1 or 2."""

    def scored(index: int, group: Group) -> Group:
        scores = dict(zip(group.pairs[0], (float(index % 3), 0.0), strict=True))
        responses = tuple(Response(r.ids, scores[i]) for i, r in enumerate(group.responses))
        return dataclasses.replace(group, responses=responses)

    return [scored(index, group) for index, group in enumerate(groups)]


@pytest.mark.parametrize(
    ("lora", "margin", "micro_batch_size"),
    [(True, False, 8), (False, False, 2), (True, True, 8)],
    ids=["lora", "full, accumulated", "margin"],
)
def test_reward_model_takes_the_steps_of_trl(
    lora: bool, margin: bool, micro_batch_size: int, tmp_path: Path
) -> None:
    groups = with_margins(ragged_pairs()) if margin else ragged_pairs()
    model = reward_model(tmp_path / "base", lora=lora)
    columns = {"margin": "margin"} if margin else {}
    # Of full fine-tuning at 1e-2 nothing is left to compare after seven steps.
    rate = {} if lora else {"learning_rate": 1e-3}
    trainer = our_trainer(
        tmp_path, groups, None,
        stage="reward_model", model=copy.deepcopy(model), columns=columns, **rate, **UNEVEN,
    )  # fmt: skip
    assert trainer.limits.packed
    rows = rows_in_order(trainer)
    theirs = trl_trainer(
        ListeningReward, tmp_path, rows, model=model, micro_batch_size=micro_batch_size, **rate
    )
    assert_same_run(record(trainer, tmp_path), theirs.record())
