"""Metrics of a logging window: summed on the device, reduced once, each with its denominator.

One table of names (docs/metrics.md explains each); a mean is always a sum over its unit divided by that
unit's count over all processes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from prefopt.model.distributed import sum_over_processes
from prefopt.storage.cache import atomic_write
from prefopt.storage.reading import UnreadableError, keep_beside, log_lines, mend_end
from prefopt.storage.run_files import METRICS_ROW
from prefopt.storage.run_files import read_metrics as read_metrics  # also found beside the writer
from prefopt.training.checkpoint import writing

logger = logging.getLogger(__name__)

LOSSES = ("loss/pairs", "loss/nll", "loss/samples")
"""The means whose sum is minimised; a window that had anything to learn from has one of them."""


class MeanMeter:
    """Sums and counts by name, held on one device until `reduce`.

    A process may lack names that others have (a share without samples, say): they count as nothing there.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self._totals: set[str] = set()
        self._running: set[str] = set()

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Adds ``total`` over ``count`` units to the mean called ``name``."""
        pair = torch.stack([_scalar(total, self.device), _scalar(count, self.device)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def add_total(self, name: str, amount: Tensor | float) -> None:
        """Adds to a plain sum over the window and all processes."""
        self._totals.add(name)
        self.add(name, amount, 1.0)

    def add_running(self, name: str, amount: Tensor | float) -> None:
        """Adds to a plain sum over the whole run and all processes."""
        self._running.add(name)
        self.add_total(name, amount)

    def add_values(self, values: Mapping[str, Tensor]) -> None:
        """Adds per-item tensors: each a sum over its elements, counted by their number."""
        for name, value in values.items():
            self.add(name, value.detach().double().sum(), float(value.numel()))

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes, and forgets them; a name without a single item is left out."""
        names, stacked = self._stacked(accelerator)
        self._sums = {name: pair for name, pair in self._sums.items() if name in self._running}
        return {
            name: total if name in self._totals else total / count
            for name, (total, count) in zip(names, stacked.tolist(), strict=True)
            if count
        }

    def state_dict(self, accelerator: Any) -> dict[str, Any]:
        """What was added since the last `reduce`, over all processes; for a checkpoint. A collective."""
        names, stacked = self._stacked(accelerator)
        sums = dict(zip(names, stacked.tolist(), strict=True))
        return {"sums": sums, "totals": sorted(self._totals), "running": sorted(self._running)}

    def copied(self) -> Any:
        """What this process holds, for `put_back`; no collective."""
        return (
            dict(self._sums),
            set(self._totals),
            set(self._running),
        )  # sums are never added to in place

    def put_back(self, held: Any) -> None:
        """As it was when it was `copied`."""
        self._sums, self._totals, self._running = dict(held[0]), set(held[1]), set(held[2])

    def _stacked(self, accelerator: Any) -> tuple[list[str], Tensor]:
        """Every process's names, and (names, 2) sums and counts over all processes. A collective."""
        names = set(self._sums)
        if accelerator.num_processes > 1:
            everyone = gather_object([(sorted(names), sorted(self._totals))])
            names = {name for theirs, _ in everyone for name in theirs}
            self._totals |= {name for _, theirs in everyone for name in theirs}
        ordered = sorted(names)
        if not ordered:
            return [], torch.zeros(0, 2)
        none = torch.zeros(2, dtype=torch.float64, device=self.device)
        stacked = torch.stack([self._sums.get(name, none) for name in ordered])
        if accelerator.num_processes > 1:
            stacked = sum_over_processes(accelerator, stacked)
        return ordered, stacked

    def load_state_dict(self, state: Mapping[str, Any], accelerator: Any) -> None:
        """Goes on from `state_dict`: the main process takes the sums, others zeros, so each counts once."""
        share = float(accelerator.is_main_process)
        self._sums = {
            name: share * torch.tensor(pair, dtype=torch.float64, device=self.device)
            for name, pair in state["sums"].items()
        }
        self._totals = set(state["totals"])
        self._running = set(state.get("running", ()))


def _scalar(value: Tensor | float, device: torch.device | str) -> Tensor:
    # fp64: a window sums thousands of fp32 terms, and the CPU-side means are compared across splits.
    return torch.as_tensor(value, dtype=torch.float64, device=device).detach()


class MetricsLog:
    """``metrics.jsonl``: one JSON object a logging step, flushed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row. Raises: TrainingError if it cannot be written."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        """Drops what a resumed run writes again: rows after ``step``, and at 0 that of the start too.

        A torn end is cut off. Lines that are no rows were damaged or edited: the run needs none of them, so it
        goes on without, says so, and keeps the file as it was under another name.
        """
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                return
            mend_end(self.path, "that row is written again")
            kept, odd = [], []
            for line in log_lines(self.path):
                try:
                    if 0 < step >= line.row(METRICS_ROW)["step"]:
                        kept.append(line.data + b"\n")
                except UnreadableError as error:
                    odd.append(f"{line.number} ({error})")
            if odd:
                aside = keep_beside(self.path)
                logger.warning(
                    "%s: %d lines are no rows and are left out, line %s; the file as it was is kept as %s",
                    self.path, len(odd), odd[0], aside.name,
                )  # fmt: skip
            with atomic_write(self.path) as temporary:
                temporary.write_bytes(b"".join(kept))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on a CUDA device, resident set of this process on CPU; in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # not on Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # KiB on Linux
