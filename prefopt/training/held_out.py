"""Metrics of a held-out set: over all of it, and of each source where there are several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prefopt.data.groups import GroupSource
from prefopt.training.batch_metrics import add_batch_metrics, derived
from prefopt.training.metrics import LOSSES, MeanMeter
from prefopt.types import ObjectiveOutput, ResponseLogps, ResponseScores

Seen = ResponseLogps | ResponseScores
Forwards = Callable[[Sequence[int]], Iterable[tuple[Seen, ObjectiveOutput]]]
"""From row numbers to what the objective saw of this process's share of them, and said."""


def held_out_metrics(source: GroupSource, forwards: Forwards, accelerator: Any) -> dict[str, float]:
    """Means named ``eval/…``, every pair or sample counted once, and ``eval/<source>/…``. A collective."""
    whole, row = MeanMeter(accelerator.device), {}
    for name, rows in source.parts:
        part = MeanMeter(accelerator.device)
        for seen, output in forwards(rows):
            for meter in (whole, part):
                add_batch_metrics(meter, seen, output)
        if len(source.parts) > 1:
            row |= _means(part, accelerator, f"eval/{name}")
    return _means(whole, accelerator, "eval") | row


def _means(meter: MeanMeter, accelerator: Any, prefix: str) -> dict[str, float]:
    row = derived(meter.reduce(accelerator))
    row["loss/total"] = sum(row.get(name, 0.0) for name in LOSSES)
    return {f"{prefix}/{name}": value for name, value in row.items()}
