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

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from prefopt.errors import ModelError, suggest
from prefopt.model.attention.masks import ask_mask
from prefopt.model.collate import TokenLayout

# name -> module that defines it, imported when it is first used.
KERNELS: dict[str, str] = {"reference": "prefopt.model.attention.reference"}

_PREFIX = "prefopt_"


@dataclass(frozen=True)
class Kernel:
    """How packed rows are attended to."""

    attend: Callable[..., tuple[Tensor, None]]
    """transformers' attention function; what ``prepare`` gave comes as its keyword ``packed_masks``, and what the
    model asked its mask to be as a `prefopt.model.attention.masks.MaskRule`."""
    prepare: Callable[[TokenLayout], Any]
    """Built once a forward and shared by all layers. Neither a tensor nor a mapping, so that it passes through
    wrappers (DDP, DeepSpeed, checkpointing) as it is."""


def load_kernel(name: str) -> tuple[Kernel, str]:
    """The kernel, and what transformers knows it by from now on.

    A model that asks for a mask under that name gets its question back, to be put to the packed row.
    Raises: ModelError naming the nearest known one.
    """
    if name not in KERNELS:
        raise ModelError(f"attention kernel {name!r}: unknown; {suggest(name, set(KERNELS))}")
    kernel: Kernel = importlib.import_module(KERNELS[name]).KERNEL
    AttentionInterface.register(_PREFIX + name, kernel.attend)
    AttentionMaskInterface.register(_PREFIX + name, ask_mask)
    return kernel, _PREFIX + name


def packed_keywords(kernel: Kernel, layout: TokenLayout) -> dict[str, Any]:
    """What a decoder is called with, beside ids and positions, to run over a packed layout."""
    # A mask of ones, because without one transformers takes positions that start again for sequences of their own.
    ones = torch.ones_like(layout.input_ids)
    return {"attention_mask": ones, "packed_masks": kernel.prepare(layout)}


def is_packed(implementation: str | None) -> bool:
    """Is this attention implementation, as a transformers config names it, one of our kernels?"""
    return (implementation or "").startswith(_PREFIX)
