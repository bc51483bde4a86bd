"""Optimizer and learning-rate schedule, the latter a pure function of the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from prefopt.recipe.schema import TrainSection

logger = logging.getLogger(__name__)


def learning_rate(train: TrainSection, step: int, num_steps: int) -> float:
    """Learning rate of 0-based optimizer step ``step``: linear warm-up, then the schedule, to 0 at the end.

    The same values as transformers' schedulers at that step, without state to save.
    """
    warmup = math.ceil(train.warmup_frac * num_steps)
    if step < warmup:
        return train.learning_rate * step / warmup
    if train.lr_scheduler == "constant":
        return train.learning_rate
    progress = (step - warmup) / max(1, num_steps - warmup)
    if train.lr_scheduler == "linear":
        return train.learning_rate * (1 - progress)
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def say_if_nothing_moves(train: TrainSection, num_steps: int) -> None:
    """Warns where no step moves a weight: warm-up begins at 0, and may be all there is.

    No error: whoever tries a recipe for one step means to see it run.
    """
    if not any(learning_rate(train, step, num_steps) for step in range(num_steps)):
        logger.warning(
            "train.warmup_frac = %g: the run has %d step, the first of its warm-up, whose learning rate is 0: "
            "the result will be the weights it began with. To train, set it to 0 or take more steps "
            "(train.num_epochs, a smaller train.global_batch_size)", train.warmup_frac, num_steps,
        )  # fmt: skip


def build_optimizer(model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters; biases and norms take no weight decay."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = parameter_groups(trainable, train.weight_decay)
    if train.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=train.learning_rate)
    betas = (train.adam_beta1, train.adam_beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.adam_epsilon)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Parameters with and without weight decay; one-dimensional ones (norms, biases) have none."""
    decayed, exempt = [], []
    for _, parameter in named:
        # ZeRO-3 may hold a flat shard; ds_shape is the parameter's own shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if len(shape) > 1 else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Sets every group's rate; works on accelerate's and DeepSpeed's wrappers alike."""
    for group in optimizer.param_groups:
        group["lr"] = value
