"""Is there room on the disk for what a run saves? Estimated from the weights, before the first step."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefopt.errors import ConfigError
from prefopt.storage.run_files import CHECKPOINTS, complete_checkpoints

logger = logging.getLogger(__name__)

_MOMENTS = {"adamw": 2, "rmsprop": 1}
"""Numbers that an optimizer keeps of each weight it trains."""


@dataclass(frozen=True)
class Needed:
    """Bytes, estimated: states of random generators, tokenizer and the like are left out."""

    checkpoint: int
    final: int


def needed_room(model: nn.Module, optimizer: str, *, keeps_masters: bool, is_peft: bool) -> Needed:
    """What a checkpoint and the result take.

    Args:
        optimizer: ``train.optimizer``.
        keeps_masters: the launch keeps fp32 copies of weights and moments, whatever they are loaded in.
        is_peft: the result is the adapter alone.
    """
    checkpoint = final = 0
    for parameter in model.parameters():
        count, width = _numel(parameter), parameter.element_size()
        if parameter.requires_grad or not is_peft:
            final += count * width
        if parameter.requires_grad:
            state = 4 if keeps_masters else width
            checkpoint += count * (width + _MOMENTS[optimizer] * state + 4 * keeps_masters)
    return Needed(checkpoint, final)


def check_room(run_dir: Path, needed: Needed, keep: int) -> None:
    """Says what the run will take if that is more than there is.

    Args:
        keep: ``train.keep_checkpoints``; while one more is written, all of them are there.

    Raises: ConfigError where not even one checkpoint, or the result, fits.
    """
    free = shutil.disk_usage(run_dir).free
    old = len(complete_checkpoints(run_dir / CHECKPOINTS))
    most = max(1, keep + 1 - old) * needed.checkpoint + needed.final
    if free >= most:
        return
    what = (
        f"run.output_dir = {run_dir}: {_gib(free)} free there. A checkpoint of this run takes about "
        f"{_gib(needed.checkpoint)}, its result {_gib(needed.final)}"
    )
    if free < max(needed.checkpoint, needed.final):
        raise ConfigError(f"{what}: that cannot be written. Make room, or choose another place")
    logger.warning(
        "%s: with train.keep_checkpoints = %d about %s in all. Make room, or keep fewer",
        what, keep, _gib(most),
    )  # fmt: skip


def _numel(parameter: torch.Tensor) -> int:
    sharded: Any = parameter
    return int(getattr(sharded, "ds_numel", parameter.numel()))  # ZeRO-3 holds a shard


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
