"""Trains a value head by MSE on scored responses, and says how far off it is on prompts it has not seen.

Deterministic given a seed: which prompts are held out, the order of batches, dropout.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.errors import DataError, TrainingError
from prefopt.values.features import StoredStates
from prefopt.values.heads import make_head

logger = logging.getLogger(__name__)

MIN_HELD_OUT = 10
"""Least prompts to measure a head on: the error of fewer says nothing."""

Keep = Literal["validation", "train"]


@dataclass(frozen=True)
class FitSettings:
    """How a head is trained; the defaults are those of the official code on HHA (methods C1 (d))."""

    head: str = "attention"
    max_value: float = 1.0
    epochs: int = 10
    learning_rate: float = 1e-5
    batch_size: int = 16
    validation_frac: float = 0.1
    keep: Keep = "validation"
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """One scored response: its prompt, as a number in the stored states, and its reward."""

    prompt: int
    reward: float


@dataclass(frozen=True)
class Errors:
    """How far predictions are from rewards."""

    mse: float
    r2: float | None
    """1 - MSE / variance of these rewards; at or below 0 a constant is as good. None: they are all equal."""


@dataclass(frozen=True)
class Epoch:
    """One pass over the training prompts."""

    number: int
    train_mse: float
    """Mean over the epoch's batches as they were trained on: dropout on, the weights of each moment."""
    validation: Errors


@dataclass(frozen=True)
class Fit:
    """A trained head."""

    head: nn.Module
    """Of the epoch that was kept; in eval mode."""
    epochs: tuple[Epoch, ...]
    kept: Epoch
    constant_mse: float
    """On the held-out rewards, of always predicting the mean of the training rewards."""
    held_out: frozenset[int]
    """Prompts that it was not trained on."""
    values: tuple[float, ...]
    """Prediction for every prompt."""


def fit_head(
    states: StoredStates,
    examples: Sequence[Example],
    settings: FitSettings,
    device: torch.device,
) -> Fit:
    """The head of the best epoch: AdamW (β 0.9, 0.999, no decay), constant learning rate, no clipping.

    The official code keeps the epoch with the lowest *training* MSE and holds nothing out (``keep="train"`` keeps
    by that rule); ``keep="validation"`` keeps the lowest MSE on held-out prompts, the first of equals.

    Args:
        states: of every prompt.
        examples: scored responses; several of one prompt are several examples.
        settings: of the training.
        device: where the head is trained.

    Raises: DataError for too few prompts; TrainingError for a loss that is not finite.
    Source: methods C1 (b), (d); ``train_value_function_on_val_predictions`` of abaheti95/LoL-RL.
    """
    held_out = _held_out({example.prompt for example in examples}, settings)
    train = [example for example in examples if example.prompt not in held_out]
    validation = [example for example in examples if example.prompt in held_out]
    head = make_head(settings.head, states.hidden_size, settings.max_value, seed=settings.seed).to(
        device
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    order = random.Random(f"{settings.seed}\0value")
    epochs: list[Epoch] = []
    best: tuple[float, Epoch, dict[str, Tensor]] | None = None
    with _seeded(settings.seed, device):
        for number in range(1, settings.epochs + 1):
            order.shuffle(train)
            train_mse = _train_epoch(head, optimizer, states, train, settings.batch_size, device)
            epoch = Epoch(number, train_mse, measure(head, states, validation, device))
            epochs.append(epoch)
            logger.info(
                "value head, epoch %d of %d: MSE %.4g in training, %.4g held out",
                number, settings.epochs, train_mse, epoch.validation.mse,
            )  # fmt: skip
            score = train_mse if settings.keep == "train" else epoch.validation.mse
            if best is None or score < best[0]:
                best = score, epoch, copy.deepcopy(head.state_dict())
    assert best is not None  # at least one epoch
    head.load_state_dict(best[2])
    mean = statistics.fmean(example.reward for example in train)
    constant = statistics.fmean((example.reward - mean) ** 2 for example in validation)
    values = predict(head, states, range(max(e.prompt for e in examples) + 1), device)
    return Fit(head.eval(), tuple(epochs), best[1], constant, held_out, tuple(values))


@torch.no_grad()
def predict(
    head: nn.Module, states: StoredStates, prompts: Sequence[int], device: torch.device
) -> list[float]:
    """The values of some prompts, in order, in eval mode; a prompt's value does not depend on the others."""
    head.eval()
    found: list[float] = []
    for index in prompts:  # one at a time: no padding, and so to the bit the same in any company
        found += head(*states.batch([index], device)).tolist()
    return found


def measure(
    head: nn.Module, states: StoredStates, examples: Sequence[Example], device: torch.device
) -> Errors:
    """MSE and R² of a head on scored responses."""
    prompts = sorted({example.prompt for example in examples})
    values = dict(zip(prompts, predict(head, states, prompts, device), strict=True))
    return errors([values[e.prompt] for e in examples], [e.reward for e in examples])


def errors(values: Sequence[float], rewards: Sequence[float]) -> Errors:
    """MSE and R² of predictions."""
    mse = statistics.fmean((v - r) ** 2 for v, r in zip(values, rewards, strict=True))
    variance = float(np.var(rewards))
    return Errors(mse, 1 - mse / variance if variance > 0 else None)


def _train_epoch(
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    states: StoredStates,
    examples: Sequence[Example],
    batch_size: int,
    device: torch.device,
) -> float:
    """One pass in the order given; the mean of the batches' losses."""
    head.train()
    losses = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        rewards = torch.tensor([example.reward for example in batch], device=device)
        values = head(*states.batch([example.prompt for example in batch], device))
        loss = F.mse_loss(values, rewards)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    mean = statistics.fmean(losses)
    if not math.isfinite(mean):
        raise TrainingError(
            "the value head's loss is not finite: the reference's hidden states are not, or the learning rate is "
            "far too high; lower value.learning_rate"
        )
    return mean


def _held_out(prompts: set[int], settings: FitSettings) -> frozenset[int]:
    """The prompts to validate on, drawn by the seed. Raises: DataError if they would be too few."""
    count = round(settings.validation_frac * len(prompts))
    if count < MIN_HELD_OUT or count >= len(prompts):
        least = math.ceil(MIN_HELD_OUT / settings.validation_frac)
        raise DataError(
            f"a dev set of {len(prompts)} different prompts with a scored response: value.validation_frac = "
            f"{settings.validation_frac:g} leaves {count} to measure the head on, and at least {MIN_HELD_OUT} are "
            f"needed, because the error of fewer says nothing. Give {least} prompts or more, or raise "
            "validation_frac"
        )
    drawn = random.Random(f"{settings.seed}\0held out").sample(sorted(prompts), count)
    return frozenset(drawn)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout by the seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
