"""Frozen policies that score token ids, for evaluations and signals: where they run, and their log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from prefopt.data.groups import GroupList
from prefopt.model.micro_batches import SplitLimits, split_micro_batches
from prefopt.model.sweep import layout_fn, split_rows
from prefopt.types import Group


def default_device(device: str | None = None) -> torch.device:
    """``device``; without one CUDA where there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def forward_batches(model: Any, groups: Sequence[Group], batch_tokens: int) -> list[list[int]]:
    """Row numbers of one forward of a `LogpModel` each, of at most ``batch_tokens``; a longer group goes alone."""
    limits = SplitLimits(batch_tokens, packed=model.packed)
    return split_micro_batches(GroupList(groups), range(len(groups)), limits)


@torch.inference_mode()
def token_logps(model: Any, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
    """A group's responses' token log-probs, (T,) fp32 nats each, at temperature 1, groups in order.

    Args:
        model: a `LogpModel` in eval mode; its parameters say where it runs.
        groups: of at least one response each.
        batch_tokens: as `forward_batches`.
    """
    found: dict[int, list[np.ndarray]] = {}
    device = next(model.parameters()).device
    for rows in forward_batches(model, groups, batch_tokens):
        batch = [groups[row] for row in rows]
        layout = layout_fn(packed=model.packed)(batch).to(device)
        found |= dict(zip(rows, split_rows(batch, model(layout)), strict=True))
    return [found[row] for row in range(len(groups))]
