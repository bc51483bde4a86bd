"""Objectives against TRL's own loss code, fed the same token log-probs: no model, no tokenizer.

TRL's CPO and ORPO losses are methods on tensors. Its DPO losses stand inside ``DPOTrainer._compute_loss``,
which runs here on a stand-in trainer whose model returns the token log-probs of the test.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

from prefopt.types import ResponseLogps
from tests.unit.objective_cases import call, random_batch

# Two fp32 evaluations of one formula, rearranged: a few units in the last place of sums near 10.
TOLERANCE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-6}


class _Recorded(nn.Module):
    """A model whose forward gives prepared token log-probs, in the form of TRL's fused LM head."""

    is_gradient_checkpointing = False

    def __init__(self, logps: Tensor) -> None:
        super().__init__()
        self.logps = logps

    def forward(self, **_: Any) -> SimpleNamespace:
        nothing = torch.zeros_like(self.logps)
        return SimpleNamespace(
            log_probs=self.logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )


def _trl_dpo_trainer(
    loss_types: list[str], policy: Tensor, reference: Tensor, **values: Any
) -> Any:
    def itself(tensor: Tensor) -> Tensor:
        return tensor

    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        gather=itself,
        gather_for_metrics=itself,
        autocast=contextlib.nullcontext,
    )
    settings: dict[str, Any] = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "loss_weights": [1.0] * len(loss_types),
    }
    return SimpleNamespace(
        **(settings | values),
        loss_types=loss_types,
        model=_Recorded(policy),
        ref_model=_Recorded(reference),
        accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def _trl_dpo_loss(loss_types: list[str], lp: ResponseLogps, **values: Any) -> Tensor:
    """The batch mean that TRL's DPOTrainer takes over the pairs of ``lp``."""
    assert lp.reference is not None
    rows = lp.pairs.T.reshape(-1)  # TRL's batch is all chosen rows, then all rejected ones
    # One prompt token in front: TRL drops the first position of the mask when it shifts labels.
    completion_mask = nn.functional.pad(lp.mask[rows].long(), (1, 0))
    inputs = {"input_ids": completion_mask, "completion_mask": completion_mask}
    inputs["attention_mask"] = torch.ones_like(completion_mask)
    trainer = _trl_dpo_trainer(loss_types, lp.policy[rows], lp.reference[rows], **values)
    return DPOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)


# ours, our hyper-parameters, TRL's loss types, TRL's settings
DPO_FAMILY = [
    ("dpo", {"beta": 0.3}, ["sigmoid"], {"beta": 0.3}),
    (
        "dpo",
        {"beta": 0.3, "nll_weight": 0.7},
        ["sigmoid", "sft"],
        {"beta": 0.3, "loss_weights": [1.0, 0.7]},
    ),
    (
        "robust_dpo",
        {"beta": 0.3, "label_smoothing": 0.2},
        ["robust"],
        {"beta": 0.3, "label_smoothing": 0.2},
    ),
    ("ld_dpo", {"beta": 0.3, "alpha": 0.4}, ["sigmoid"], {"beta": 0.3, "ld_alpha": 0.4}),
    ("ipo_mean", {"beta": 0.3}, ["ipo"], {"beta": 0.3}),
    ("hinge", {"beta": 0.3}, ["hinge"], {"beta": 0.3}),
    ("apo_zero", {"beta": 0.3}, ["apo_zero"], {"beta": 0.3}),
    ("apo_down", {"beta": 0.3}, ["apo_down"], {"beta": 0.3}),
    ("nll", {}, ["sft"], {}),
]


@pytest.mark.parametrize(("name", "values", "loss_types", "settings"), DPO_FAMILY)
def test_the_dpo_family_has_the_loss_and_gradient_of_trl(
    name: str, values: dict[str, float], loss_types: list[str], settings: dict[str, Any]
) -> None:
    batch = random_batch()
    ours, theirs = (batch.policy.clone().requires_grad_() for _ in range(2))
    output = call(name, dataclasses.replace(batch, policy=ours), **values)
    loss = output.losses.mean()
    if output.token_losses is not None:
        loss = loss + output.token_losses.sum() / batch.mask.sum(-1)[batch.pairs[:, 0]].sum()
    expected = _trl_dpo_loss(loss_types, dataclasses.replace(batch, policy=theirs), **settings)
    loss.backward()
    expected.backward()
    assert_close(loss, expected, **TOLERANCE)
    assert theirs.grad is not None
    # TRL sums the padding too, which its fused head keeps at a constant 0.
    assert_close(ours.grad, theirs.grad * batch.mask, **TOLERANCE)


def _stand_in(**values: Any) -> Any:
    return SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), alpha=0.0, **values)


def _pair_sums(lp: ResponseLogps) -> list[Tensor]:
    return [(lp.policy * lp.mask).sum(-1)[lp.pairs[:, side]] for side in (0, 1)]


def _pair_means(lp: ResponseLogps) -> list[Tensor]:
    return [total / lp.mask.sum(-1)[lp.pairs[:, side]] for side, total in enumerate(_pair_sums(lp))]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cpo_has_the_losses_of_trl(label_smoothing: float) -> None:
    batch = random_batch()
    trainer = _stand_in(loss_type="sigmoid", beta=0.3, label_smoothing=label_smoothing)
    losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, *_pair_sums(batch))
    output = call("cpo", batch, beta=0.3, label_smoothing=label_smoothing)
    assert_close(output.losses, losses, **TOLERANCE)
    assert_close(output.metrics["rewards/chosen"], chosen, **TOLERANCE)
    assert_close(output.metrics["rewards/rejected"], rejected, **TOLERANCE)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_simpo_has_the_losses_of_trl(label_smoothing: float) -> None:
    batch = random_batch()
    trainer = _stand_in(
        loss_type="simpo", beta=2.5, simpo_gamma=1.375, label_smoothing=label_smoothing
    )
    losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, *_pair_means(batch))
    output = call("simpo", batch, beta=2.5, gamma=1.375, label_smoothing=label_smoothing)
    assert_close(output.losses, losses, **TOLERANCE)
    assert_close(output.metrics["rewards/chosen"], chosen, **TOLERANCE)
    assert_close(output.metrics["rewards/rejected"], rejected, **TOLERANCE)


def test_orpo_has_the_odds_ratio_losses_of_trl() -> None:
    """TRL's term is β log σ(…), which its trainer subtracts."""
    batch = random_batch()
    term, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(
        _stand_in(beta=0.3), *_pair_means(batch)
    )
    output = call("orpo", batch, beta=0.3)
    assert_close(output.losses, -term, **TOLERANCE)
    assert_close(output.metrics["rewards/chosen"], chosen, **TOLERANCE)
    assert_close(output.metrics["rewards/rejected"], rejected, **TOLERANCE)


def test_trl_has_another_loss_under_the_name_of_ipo() -> None:
    """Ours sums as the paper does. Fails when TRL changes its convention: then ipo_mean's docs must too."""
    batch = random_batch()
    theirs = _trl_dpo_loss(["ipo"], batch, beta=0.3)
    assert not torch.isclose(call("ipo", batch, beta=0.3).losses.mean(), theirs, rtol=1e-2)


def test_trl_still_ignores_label_smoothing_in_its_sigmoid_loss() -> None:
    """Why cDPO has no TRL oracle above; when this fails it has one."""
    batch = random_batch()
    smoothed = _trl_dpo_loss(["sigmoid"], batch, label_smoothing=0.2)
    assert_close(smoothed, _trl_dpo_loss(["sigmoid"], batch))
