"""Attention over the packed layout: one kernel a module, picked by name.

A kernel is registered with transformers as ``prefopt_<name>``, so every architecture whose attention goes
through that interface takes the layout without a line of its own. Adding one is a module that defines
``KERNEL`` and its line in `KERNELS`; `prefopt.model.attention.reference` is what it must agree with.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AttentionInterface

from prefopt.errors import ModelError, suggest
from prefopt.model.collate import TokenLayout

# name -> module that defines it, imported when it is first used.
KERNELS: dict[str, str] = {"reference": "prefopt.model.attention.reference"}

_PREFIX = "prefopt_"


@dataclass(frozen=True)
class Kernel:
    """How packed rows are attended to."""

    attend: Callable[..., tuple[Tensor, None]]
    """transformers' attention function; what ``prepare`` gave comes as its keyword ``packed_masks``."""
    prepare: Callable[[TokenLayout], Any]
    """Built once a forward and shared by all layers. Neither a tensor nor a mapping, so that it passes through
    wrappers (DDP, DeepSpeed, checkpointing) as it is."""


def load_kernel(name: str) -> tuple[Kernel, str]:
    """The kernel, and what transformers knows it by from now on.

    No mask function is registered under that name: transformers then builds no mask of its own.
    Raises: ModelError naming the nearest known one.
    """
    if name not in KERNELS:
        raise ModelError(f"attention kernel {name!r}: unknown; {suggest(name, set(KERNELS))}")
    kernel: Kernel = importlib.import_module(KERNELS[name]).KERNEL
    AttentionInterface.register(_PREFIX + name, kernel.attend)
    return kernel, _PREFIX + name


def is_packed(implementation: str | None) -> bool:
    """Is this attention implementation, as a transformers config names it, one of our kernels?"""
    return (implementation or "").startswith(_PREFIX)
