"""A reference known before training: one forward over what the store lacks, then no reference model.

The policy as loaded *is* the ``initial`` reference, so its log-probs are taken before the first step and
no second copy of the weights exists, under LoRA or full fine-tuning alike.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
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
from prefopt.reference.base import FrozenReference
from prefopt.reference.store import ReferenceStore
from prefopt.types import Group

logger = logging.getLogger(__name__)

_FLUSH_EVERY = 4096  # groups: what a kill during the pass can cost


class StoredReference(FrozenReference):
    """Reference log-probs of every row a run will see, in memory (4 bytes a response token), by source row.

    Held here rather than read from the store each step, so that nothing that happens to the store's files
    can touch a run under way, and so that a row's tokens are hashed once a run and not once a step.
    """

    def __init__(self, store: ReferenceStore, *, is_initial_policy: bool) -> None:
        self.where = f"stored at {store.directory}; delete that and run again"
        self.is_initial_policy = is_initial_policy
        self._store = store
        self._arrays: dict[Hashable, Sequence[np.ndarray]] = {}

    def logps(self, batches: Sequence[Sequence[Group]], version: int | None = None) -> list[Tensor]:
        """See `Reference`; rows that `fill` was not given are a KeyError."""
        return [self._padded(groups) for groups in batches]

    def _padded(self, groups: Sequence[Group]) -> Tensor:
        lengths = [len(response.ids) for group in groups for response in group.responses]
        arrays = [array for group in groups for array in self._arrays[group.source_row]]
        result = torch.zeros(len(lengths), max(lengths))
        for row, (array, length) in enumerate(zip(arrays, lengths, strict=True)):
            result[row, :length] = torch.from_numpy(array)
        return result

    def fill(
        self,
        model: Any,
        source: GroupSource,
        rows: Sequence[int],
        limits: SplitLimits,
        accelerator: Accelerator,
    ) -> int:
        """Reads ``rows`` from the store, computes and stores what it lacks; returns how many groups.

        The forwards are shared over processes. A collective.

        Args:
            model: the `LogpModel` of the reference weights, wrapped if the policy is.

        Raises: TrainingError if what another process computed cannot be read.
        """
        missing = _on_any_process(self._read(source, rows), rows, accelerator)
        pending = 0
        layout = layout_fn(packed=limits.packed)
        for groups, logps, counts in sweep(
            model, source, missing, limits, accelerator, layout=layout, what="reference"
        ):
            if counts:
                self._take(groups, split_rows(groups, logps))
                pending += len(groups)
            if pending >= _FLUSH_EVERY:
                self._store.flush()
                pending = 0
        self._store.flush()
        accelerator.wait_for_everyone()
        self._store.refresh()
        for row in self._read(source, missing):
            raise TrainingError(
                f"reference log-probs of {source.group(row).id} were computed but cannot be read from "
                f"{self._store.directory}: its disk is full, or several machines do not share it; set "
                "reference.cache_dir to storage that all of them share"
            )
        if accelerator.is_main_process:
            logger.info("reference log-probs: computed %d of %d groups", len(missing), len(rows))
        return len(missing)

    def _read(self, source: GroupSource, rows: Sequence[int]) -> list[int]:
        """Takes what is not held yet from the store; returns the rows that are not there."""
        absent, found, dropped = [], [], self._store.num_dropped
        for row in rows:
            group = source.group(row)
            if group.source_row in self._arrays:
                continue
            arrays = self._store.get(group)
            if arrays is None:
                absent.append(row)
            else:
                self._arrays[group.source_row] = arrays
                found.append(row)
        if self._store.num_dropped > dropped:  # what was read from a damaged part goes back to disk
            held = map(source.group, found)
            self._store.add((group, self._arrays[group.source_row]) for group in held)
        return absent

    def _take(self, groups: Sequence[Group], arrays: Sequence[Sequence[np.ndarray]]) -> None:
        self._store.add(zip(groups, arrays, strict=True))
        for group, each in zip(groups, arrays, strict=True):
            self._arrays.setdefault(group.source_row, each)


def _on_any_process(
    absent: Sequence[int], rows: Sequence[int], accelerator: Accelerator
) -> list[int]:
    """Rows that any process cannot find: all must run the same number of forwards."""
    if accelerator.num_processes == 1:
        return list(absent)
    mine = set(absent)
    flags = torch.tensor([float(row in mine) for row in rows], device=accelerator.device)
    flags = sum_over_processes(accelerator, flags)
    return [row for row, flag in zip(rows, flags.tolist(), strict=True) if flag > 0]
