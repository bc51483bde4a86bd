"""Rows split into forward passes of one process: few, and none larger than the limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.data.groups import GroupSource
from prefopt.model.logps import unwrap_causal_lm
from prefopt.recipe.schema import DEFAULT_MICRO_BATCH_TOKENS, TrainSection


@dataclass(frozen=True)
class SplitLimits:
    """How large one forward pass of one process may be."""

    max_tokens: int
    max_groups: int | None = None
    packed: bool = True


# Micro-batches that a row may still join. With rows longest first, older ones are as good as full, and
# a bound keeps a pass over 60,000 rows from comparing each with thousands of them.
_OPEN_BATCHES = 32


def split_micro_batches(
    source: GroupSource, rows: Sequence[int], limits: SplitLimits
) -> list[list[int]]:
    """Rows in few micro-batches that fit ``limits``: longest first, each into the first that has room."""
    tokens = {row: forward_tokens(source, row, limits.packed) for row in rows}
    batches: list[list[int]] = []
    loads: list[int] = []
    for row in sorted(rows, key=lambda r: (tokens[r], r), reverse=True):
        for index in range(max(0, len(batches) - _OPEN_BATCHES), len(batches)):
            batch = batches[index]
            # Padded, a shorter row takes as much as the longest of its batch, which is the first.
            load = loads[index] + tokens[row if limits.packed else batch[0]]
            if load <= limits.max_tokens and len(batch) != limits.max_groups:
                batch.append(row)
                loads[index] = load
                break
        else:
            batches.append([row])
            loads.append(tokens[row])
    return batches


def longest_row_tokens(source: GroupSource, packed: bool) -> int:
    """Tokens of the largest forward that a single row can need."""
    return max(forward_tokens(source, row, packed) for row in range(len(source)))


def forward_tokens(source: GroupSource, row: int, packed: bool) -> int:
    """Tokens of a forward over one row alone: prompt once and no padding if packed, else both in full."""
    prompt, responses = int(source.prompt_lengths[row]), source.response_lengths[row]
    if packed:
        return prompt + int(responses.sum())
    return (prompt + int(responses.max())) * len(responses)


def split_limits(
    settings: TrainSection, module: Any, longest: int, device: torch.device
) -> SplitLimits:
    """The recipe's bounds on one forward, or the device's defaults, never below the longest row.

    Args:
        module: a `LogpModel` or `ScoreModel`.
        longest: row in tokens.
    """
    tokens = settings.micro_batch_tokens
    if tokens is None:
        tokens = DEFAULT_MICRO_BATCH_TOKENS
        if device.type == "cpu":
            config = unwrap_causal_lm(module.model).config.get_text_config(decoder=True)
            # Some 200 MB of activations: enough tokens to fill the cores, and no slower than more
            # (measured with bench/offline_step.py: 2 pairs a forward against 8).
            tokens = max(256, 2**20 // (config.num_hidden_layers * config.hidden_size))
        tokens = max(tokens, longest)
    return SplitLimits(tokens, settings.micro_batch_size, module.packed)
