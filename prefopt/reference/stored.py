"""Fills the reference store before training: one forward over what is missing, then no reference model.

The policy as loaded *is* the ``initial`` reference, so its log-probs are taken before the first step and
no second copy of the weights exists, under LoRA or full fine-tuning alike.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from prefopt.data.groups import GroupSource
from prefopt.errors import TrainingError
from prefopt.model.distributed import sum_over_processes
from prefopt.model.micro_batches import SplitLimits
from prefopt.model.sweep import layout_fn, split_rows, sweep
from prefopt.reference.store import ReferenceStore, response_key
from prefopt.types import Group

logger = logging.getLogger(__name__)

_FLUSH_EVERY = 4096  # groups: what a kill during the pass can cost


class ReferenceLogps:
    """Reference log-probs of every group a run will see, in memory (4 bytes a response token).

    Held here rather than read from the store each step, so that nothing that happens to the store's files
    can touch a run under way.
    """

    def __init__(self, directory: Path, *, is_initial_policy: bool) -> None:
        self.where = f"stored at {directory}; delete that and run again"
        self.is_initial_policy = is_initial_policy
        self._arrays: dict[bytes, np.ndarray] = {}

    def load(self, store: ReferenceStore, groups: Iterable[Group]) -> None:
        """Takes the log-probs of ``groups`` from ``store``; TrainingError if one is not there."""
        for group in groups:
            arrays = store.get(group)
            if arrays is None:
                raise TrainingError(
                    f"reference log-probs of {group.id} were computed but cannot be read from "
                    f"{store.directory}: its disk is full, or several machines do not share it; set "
                    "reference.cache_dir to storage that all of them share"
                )
            for response, array in zip(group.responses, arrays, strict=True):
                self._arrays[response_key(group.prompt_ids, response)] = array

    def prepare(self, batches: Sequence[Sequence[Group]], version: int | None = None) -> None:
        """Nothing to do: every row of the run was computed before it."""

    def after_push(self, version: int) -> None:
        """Nothing changes."""

    def after_step(self) -> None:
        """Nothing changes."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to load: the store has it."""

    def tensor(self, groups: Sequence[Group]) -> Tensor:
        """(R, T) fp32, rows group by group, zero outside each response."""
        arrays = [self._arrays[response_key(g.prompt_ids, r)] for g in groups for r in g.responses]
        result = torch.zeros(len(arrays), max(map(len, arrays)))
        for row, array in enumerate(arrays):
            result[row, : len(array)] = torch.from_numpy(array)
        return result


def fill_store(
    store: ReferenceStore,
    model: Any,
    source: GroupSource,
    rows: Sequence[int],
    limits: SplitLimits,
    accelerator: Accelerator,
) -> int:
    """Computes and stores what ``store`` lacks of ``rows``, shared over processes; returns how many groups.

    Args:
        model: the `LogpModel` of the reference weights, wrapped if the policy is.
    """
    missing = _agreed_missing(store, source, rows, accelerator)
    pending = 0
    layout = layout_fn(packed=limits.packed)
    for groups, logps, counts in sweep(
        model, source, missing, limits, accelerator, layout=layout, what="reference"
    ):
        if not counts:
            continue
        store.add(zip(groups, split_rows(groups, logps), strict=True))
        pending += len(groups)
        if pending >= _FLUSH_EVERY:
            store.flush()
            pending = 0
    store.flush()
    accelerator.wait_for_everyone()
    store.refresh()
    if accelerator.is_main_process:
        logger.info("reference log-probs: computed %d of %d groups", len(missing), len(rows))
    return len(missing)


def _agreed_missing(
    store: ReferenceStore, source: GroupSource, rows: Sequence[int], accelerator: Accelerator
) -> list[int]:
    """Rows that any process cannot find: all must run the same number of forwards."""
    groups = {row: source.group(row) for row in rows}
    absent = {group.id for group in store.missing(groups.values())}
    flags = torch.tensor(
        [float(groups[row].id in absent) for row in rows], device=accelerator.device
    )
    if accelerator.num_processes > 1:
        flags = sum_over_processes(accelerator, flags)
    return [row for row, flag in zip(rows, flags.tolist(), strict=True) if flag > 0]
