"""Log-probs of many groups without gradients: reference passes, evaluation, scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt.data.groups import GroupSource
from prefopt.model.collate import TokenLayout, pack, pad
from prefopt.model.memory import memory_for
from prefopt.model.micro_batches import SplitLimits, split_micro_batches
from prefopt.process.progress import progress
from prefopt.report.bars import Bar
from prefopt.types import Group

LayoutFn = Callable[[Sequence[Group]], TokenLayout]


def layout_fn(*, packed: bool, pad_id: int = 0) -> LayoutFn:
    """The function that lays groups out for a model of that layout."""
    return pack if packed else lambda groups: pad(groups, pad_id=pad_id)


def share_of(
    source: GroupSource, rows: Sequence[int], limits: SplitLimits, rank: int, world_size: int
) -> list[tuple[list[int], bool]]:
    """This rank's micro-batches of ``rows``, with fillers (False) up to the longest rank's count.

    Deterministic on every rank; sharded models need the same number of forwards everywhere.
    """
    ranks = [split_micro_batches(source, rows[r::world_size], limits) for r in range(world_size)]
    most = max(len(batches) for batches in ranks)
    mine = [(batch, True) for batch in ranks[rank]]
    return mine + [([rows[0]], False)] * (most - len(mine))


def sweep(
    model: Any,
    source: GroupSource,
    rows: Sequence[int],
    limits: SplitLimits,
    accelerator: Any,
    *,
    layout: LayoutFn,
    what: str,
) -> Iterator[tuple[tuple[Group, ...], Tensor, bool]]:
    """Yields ``(groups, (R, T) fp32 log-probs, counts)`` for this rank's share of ``rows``, in eval mode.

    ``counts`` is False for a filler, which another rank has already. Every rank must exhaust the
    iterator. ``model`` is the wrapped `LogpModel`; its training mode is restored at the end.
    """
    if not rows:
        return
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batches = share_of(source, rows, limits, rank, world_size)
    was_training = model.training
    model.eval()
    hidden = not accelerator.is_main_process
    try:
        bar = Bar(batches, desc=what, unit="batch", disable=hidden, leave=False)
        for number, (batch, counts) in enumerate(bar, start=1):
            progress.tick(f"{what}, batch {number} of {len(batches)}")
            groups = tuple(source.group(row) for row in batch)
            with memory_for(f"in the {what} pass", groups, limits), torch.no_grad():
                logps = model(layout(groups).to(accelerator.device)).float()
            yield groups, logps, counts
    finally:
        model.train(was_training)


def split_rows(groups: Sequence[Group], logps: Tensor) -> list[list[np.ndarray]]:
    """Per group, one fp32 array of token log-probs a response, padding cut off."""
    values = logps.cpu().numpy()
    result, row = [], 0
    for group in groups:
        arrays = []
        for response in group.responses:
            arrays.append(values[row, : len(response.ids)].copy())
            row += 1
        result.append(arrays)
    return result
