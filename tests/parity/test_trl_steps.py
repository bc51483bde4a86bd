"""Real optimizer steps of TRL's trainers and of ours, on the same tokens: loss, gradient norm, weights.

Our side splits every global batch of eight unevenly (3 + 3 + 2 pairs); TRL's takes it whole, except where a
test says otherwise. Only whole is the token-mean NLL of its CPO the same quantity: under accumulation TRL
averages the means of micro-batches, whatever their token counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.training.metrics import read_metrics
from tests.parity.recorded_runs import (
    ListeningCPO,
    ListeningDPO,
    ListeningORPO,
    assert_same_run,
    lora,
    our_trainer,
    ragged_pairs,
    record_ours,
    rows_in_order,
    trl_trainer,
)
from tests.unit.memory_trainer import VOCABULARY
from tests.unit.tiny_models import tiny_model

DPO = {"name": "dpo", "beta": 0.5}
UNEVEN = {"micro_batch_size": 3}

# name -> (our objective without its name, TRL's trainer, TRL's options). No value is either side's default.
CASES: dict[str, tuple[dict[str, Any], type[Any], dict[str, Any]]] = {
    "dpo": ({"beta": 0.5}, ListeningDPO, {"beta": 0.5, "loss_type": "sigmoid"}),
    "dpo + nll": (
        {"beta": 0.5, "nll_weight": 0.7},
        ListeningDPO,
        {"beta": 0.5, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
    ),
    # Its loss has no lower bound; smaller values keep it away from 0, where relative errors mean nothing.
    "robust_dpo": (
        {"beta": 0.3, "label_smoothing": 0.1},
        ListeningDPO,
        {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.1},
    ),
    "ipo_mean": ({"beta": 0.7}, ListeningDPO, {"beta": 0.7, "loss_type": "ipo"}),
    # A margin of 1 nat is reached within the run: pairs beyond the kink are in it.
    "hinge": ({"beta": 1.0}, ListeningDPO, {"beta": 1.0, "loss_type": "hinge"}),
    "ld_dpo": ({"beta": 0.5, "alpha": 0.4}, ListeningDPO, {"beta": 0.5, "ld_alpha": 0.4}),
    "apo_zero": ({"beta": 0.5}, ListeningDPO, {"beta": 0.5, "loss_type": "apo_zero"}),
    "apo_down": ({"beta": 0.5}, ListeningDPO, {"beta": 0.5, "loss_type": "apo_down"}),
    "simpo": (
        {"beta": 2.5, "gamma": 1.2},
        ListeningCPO,
        {"beta": 2.5, "loss_type": "simpo", "simpo_gamma": 1.2, "cpo_alpha": 0.0},
    ),
    "simpo + nll": (
        {"beta": 2.5, "gamma": 1.2, "label_smoothing": 0.1, "nll_weight": 0.7},
        ListeningCPO,
        {"beta": 2.5, "loss_type": "simpo", "simpo_gamma": 1.2, "label_smoothing": 0.1, "cpo_alpha": 0.7},
    ),
    "cpo": (
        {"beta": 0.2, "nll_weight": 1.0},
        ListeningCPO,
        {"beta": 0.2, "loss_type": "sigmoid", "cpo_alpha": 1.0},
    ),
    # TRL's NLL covers prompt and response, ours the response: with BOS as the whole prompt they are one,
    # since a first token is never predicted. The other term is compared on longer prompts below.
    "orpo": ({"beta": 0.3}, ListeningORPO, {"beta": 0.3}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_objective_takes_the_steps_of_trl(case: str, tmp_path: Path) -> None:
    parameters, trainer_class, options = CASES[case]
    objective = {"name": case.split(" + ")[0], **parameters}
    groups = ragged_pairs(one_token_prompts=case == "orpo")
    trainer = our_trainer(tmp_path, groups, objective, **UNEVEN)
    theirs = trl_trainer(trainer_class, tmp_path, rows_in_order(trainer), **options).record()
    assert_same_run(record_ours(trainer, tmp_path), theirs)


def test_orpo_ratio_term_is_that_of_trl_on_long_prompts(tmp_path: Path) -> None:
    """At the first step, where the weights are still the same; later steps follow different NLL terms."""
    trainer = our_trainer(tmp_path, ragged_pairs(), {"name": "orpo", "beta": 0.3}, **UNEVEN)
    theirs = trl_trainer(ListeningORPO, tmp_path, rows_in_order(trainer), beta=0.3, logging_steps=1)
    assert record_ours(trainer, tmp_path).pairs == theirs.record().pairs
    ours, trl = read_metrics(tmp_path / "metrics.jsonl")[0], theirs.state.log_history[0]
    assert ours["loss/pairs"] == pytest.approx(-0.3 * trl["log_odds_ratio"], rel=1e-5)
    assert abs(ours["loss/nll"] - trl["nll_loss"]) > 1e-3  # the prompt is in theirs


@pytest.mark.parametrize("split", [{"micro_batch_size": 3}, {"micro_batch_tokens": 64}])
def test_splits_of_a_batch_take_the_steps_of_accumulation_in_trl(
    split: dict[str, int], tmp_path: Path
) -> None:
    """TRL: four micro-batches of two pairs. Ours: by count, and by tokens."""
    trainer = our_trainer(tmp_path, ragged_pairs(), DPO, **split)
    rows = rows_in_order(trainer)
    theirs = trl_trainer(ListeningDPO, tmp_path, rows, micro_batch_size=2, beta=0.5).record()
    assert_same_run(record_ours(trainer, tmp_path), theirs)


def test_padded_layout_takes_the_steps_of_trl(tmp_path: Path) -> None:
    trainer = our_trainer(tmp_path, ragged_pairs(), DPO, layout="padded", **UNEVEN)
    theirs = trl_trainer(ListeningDPO, tmp_path, rows_in_order(trainer), beta=0.5).record()
    assert_same_run(record_ours(trainer, tmp_path), theirs)


@pytest.mark.parametrize("arch", ["qwen3", "mistral", "gemma2", "phi3"])
def test_packed_layout_takes_the_steps_of_trl_on(arch: str, tmp_path: Path) -> None:
    """QK norms and tied embeddings; sliding windows shorter than the rows; softcapped logits and scores."""
    trainer = our_trainer(tmp_path, ragged_pairs(), DPO, model=lora(arch), **UNEVEN)
    assert trainer.limits.packed
    rows = rows_in_order(trainer)
    theirs = trl_trainer(ListeningDPO, tmp_path, rows, arch=arch, beta=0.5).record()
    assert_same_run(record_ours(trainer, tmp_path), theirs)


def test_training_on_from_an_adapter_takes_the_steps_of_trl(tmp_path: Path) -> None:
    """The reference is the adapter as given (TRL copies it under the name ``ref``), not the bare base."""
    trainer = our_trainer(tmp_path, ragged_pairs(), DPO, model=lora(b_std=0.1), **UNEVEN)
    rows = rows_in_order(trainer)
    theirs = trl_trainer(ListeningDPO, tmp_path, rows, model=lora(b_std=0.1), beta=0.5).record()
    assert theirs.losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert_same_run(record_ours(trainer, tmp_path), theirs)


def test_full_fine_tuning_takes_the_steps_of_trl(tmp_path: Path) -> None:
    """Every weight trains, tied embeddings too, against TRL with its second, frozen model."""
    base = str(tmp_path / "base")
    tiny_model("llama_tied", vocab_size=VOCABULARY).save_pretrained(base)
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rate = {"learning_rate": 1e-3}
    trainer = our_trainer(tmp_path, ragged_pairs(), DPO, model=policy, **rate, **UNEVEN)
    theirs = trl_trainer(
        ListeningDPO, tmp_path, rows_in_order(trainer),
        model=base, model_init_kwargs={"dtype": "float32"}, beta=0.5, **rate,
    )  # fmt: skip
    assert theirs.ref_model is not None
    assert_same_run(record_ours(trainer, tmp_path), theirs.record())
