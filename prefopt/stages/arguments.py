"""A recipe's ``train`` section in the words of TRL's configuration classes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefopt.errors import ConfigError
from prefopt.recipe.schema import DEFAULT_MICRO_BATCH_TOKENS, Recipe, TrainSection

SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
OPTIMIZERS = {"adamw": "adamw_torch", "rmsprop": "rmsprop"}


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is split: processes × rows of a forward × accumulation."""

    global_batch_size: int
    rows_per_forward: int
    accumulation: int
    num_steps: int
    """Optimizer steps of the whole run."""


def plan_batches(
    train: TrainSection, row_tokens: Iterable[int], *, num_processes: int
) -> BatchPlan:
    """Returns the split with the fewest forwards that fit ``micro_batch_size`` and ``micro_batch_tokens``.

    Args:
        train: batch sizes and run length.
        row_tokens: tokens of every training row as the stage lays it out; TRL pads to the longest of a
            batch, so the longest of all bounds what fits.
        num_processes: processes of the launch.

    Raises: ConfigError if the batch does not divide over the processes, or the longest row does not fit.
    """
    sizes = list(row_tokens)
    batch = min(train.global_batch_size, len(sizes))
    longest = max(sizes)
    tokens = train.micro_batch_tokens or max(DEFAULT_MICRO_BATCH_TOKENS, longest)
    problems = _batch_problems(train, batch, longest, num_processes)
    if problems:
        raise ConfigError(problems)
    share = batch // num_processes
    fitting = min(tokens // longest, train.micro_batch_size or share, share)
    # TRL takes forwards of one size only: the largest divisor that fits.
    rows = next(size for size in range(fitting, 0, -1) if share % size == 0)
    steps_per_epoch = math.ceil(len(sizes) / batch)
    num_steps = train.max_steps or max(1, round(steps_per_epoch * train.num_epochs))
    return BatchPlan(batch, rows, share // rows, num_steps)


def training_arguments(recipe: Recipe, plan: BatchPlan, *, has_eval: bool) -> dict[str, Any]:
    """Keyword arguments of ``SFTConfig`` and ``RewardConfig``, where they are called the same."""
    train = recipe.train
    return {
        "output_dir": str(Path(recipe.run.output_dir) / "checkpoints"),
        "run_name": recipe.run.name or Path(recipe.run.output_dir).name,
        "report_to": list(recipe.run.trackers) or "none",
        "per_device_train_batch_size": plan.rows_per_forward,
        "per_device_eval_batch_size": plan.rows_per_forward,
        "gradient_accumulation_steps": plan.accumulation,
        "max_steps": plan.num_steps,
        # TRL drops the rows that do not fill a batch only if told to; none may be lost here.
        "dataloader_drop_last": False,
        "remove_unused_columns": False,  # the `row` column must reach the collator
        "dataloader_pin_memory": torch.cuda.is_available(),
        "max_length": None,  # too long rows are already rejected and counted, never cut
        "seed": train.seed,
        **_optimization(train, plan),
        **_periods(recipe, has_eval=has_eval),
    }


def _optimization(train: TrainSection, plan: BatchPlan) -> dict[str, Any]:
    return {
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": SCHEDULERS[train.lr_scheduler],
        # An int: transformers reads a float below 1 as a share, and 1.0 as one step.
        "warmup_steps": math.ceil(train.warmup_frac * plan.num_steps),
        "optim": OPTIMIZERS[train.optimizer],
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm or 0.0,  # 0: transformers does not clip
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "gradient_checkpointing": train.gradient_checkpointing,
    }


def _periods(recipe: Recipe, *, has_eval: bool) -> dict[str, Any]:
    """When to log, evaluate and save. The first and last time are the callbacks' business."""
    train, every = recipe.train, recipe.eval.every
    periodic_eval = has_eval and every is not None
    return {
        "logging_steps": train.log_every,
        # On by default, it replaces a NaN loss by the mean of the others and trains on.
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if periodic_eval else "no",
        "eval_steps": every if periodic_eval else None,
        "prediction_loss_only": True,
        "save_strategy": "steps" if train.save_every else "no",
        "save_steps": train.save_every or 500,
        "save_total_limit": train.keep_checkpoints,
    }


def _batch_problems(train: TrainSection, batch: int, longest: int, num_processes: int) -> list[str]:
    problems = []
    if batch < num_processes:
        problems.append(
            f"{num_processes} processes share a global batch of {batch} rows: some would have nothing to do; "
            "start fewer processes or raise train.global_batch_size"
        )
    elif batch % num_processes:
        below = batch // num_processes * num_processes
        problems.append(
            f"train.global_batch_size = {batch}: does not divide over {num_processes} processes; "
            f"use {below} or {below + num_processes}"
        )
    if train.micro_batch_tokens is not None and longest > train.micro_batch_tokens:
        problems.append(
            f"train.micro_batch_tokens = {train.micro_batch_tokens}: the longest row takes {longest} tokens; "
            "raise it, or lower data.max_length_tokens to drop such rows"
        )
    return problems
