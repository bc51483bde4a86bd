"""Token groups of our data layer as the pre-tokenised rows TRL trains on; nothing is tokenised here.

The ``row`` column travels into the batch, so that a non-finite loss can be traced to its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from prefopt.data.groups import GroupSource
from prefopt.types import Group

IGNORED = -100
"""Label of a token that carries no loss."""


def sft_dataset(source: GroupSource) -> Dataset:
    """Rows ``input_ids`` and ``labels``: the loss is on the response and its EOS, never on the prompt."""
    return _dataset(source, _sft_row)


def preference_dataset(source: GroupSource) -> Dataset:
    """Rows ``chosen_ids`` and ``rejected_ids``, each prompt and response with its EOS."""
    return _dataset(source, _preference_row)


def sft_row_tokens(group: Group) -> int:
    """Tokens one SFT row occupies in a forward pass."""
    return len(group.prompt_ids) + len(group.responses[0].ids)


def preference_row_tokens(group: Group) -> int:
    """Tokens one pair occupies in TRL's padded forward pass: two rows of the longer side's width."""
    return 2 * (len(group.prompt_ids) + max(len(response.ids) for response in group.responses))


def with_rows(collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Callable[..., Any]:
    """``collate``, plus the batch's row numbers under ``row``."""

    def collate_rows(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**collate(list(examples)), "row": torch.tensor([item["row"] for item in examples])}

    return collate_rows


def _dataset(source: GroupSource, row_of: Callable[[Group], dict[str, np.ndarray]]) -> Dataset:
    rows = [row_of(source.group(index)) for index in range(len(source))]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    return Dataset.from_dict({**columns, "row": np.arange(len(rows))})


def _sft_row(group: Group) -> dict[str, np.ndarray]:
    response = group.responses[0].ids
    ids = np.array([*group.prompt_ids, *response], dtype=np.int32)
    labels = ids.copy()
    labels[: len(group.prompt_ids)] = IGNORED
    return {"input_ids": ids, "labels": labels}


def _preference_row(group: Group) -> dict[str, np.ndarray]:
    ((chosen, rejected),) = group.pairs
    sides = {"chosen_ids": chosen, "rejected_ids": rejected}
    return {
        name: np.array([*group.prompt_ids, *group.responses[side].ids], dtype=np.int32)
        for name, side in sides.items()
    }
