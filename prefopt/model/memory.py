"""Out of memory, explained: which rows, how many tokens, and the setting that is nearest to helping."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from prefopt.errors import TrainingError
from prefopt.model.micro_batches import SplitLimits
from prefopt.types import Group

# What allocators other than CUDA's say, in a plain RuntimeError.
_SAYINGS = ("can't allocate memory", "not enough memory", "out of memory")
_MOST_ROWS = 16


def is_out_of_memory(error: BaseException) -> bool:
    """Is it an allocation that failed, on a GPU or in host memory?"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in _SAYINGS)


@contextlib.contextmanager
def memory_for(
    what: str,
    groups: Sequence[Group],
    limits: SplitLimits | None = None,
    *,
    backward: bool | None = None,
) -> Iterator[None]:
    """A forward over ``groups``.

    Args:
        what: where, continues "out of memory …".
        limits: what decided how many they are; None where they were split for another forward.
        backward: None without one; else whether it recomputes activations (`train.gradient_checkpointing`).

    Raises: TrainingError that names the rows, `train.micro_batch_tokens` and the nearest remedy.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        packed = limits is None or limits.packed
        rows = [(group.id, _tokens(group, packed)) for group in groups]
        total = sum(tokens for _, tokens in rows)
        limit = total if limits is None else limits.max_tokens
        setting = "" if limits is None else f" (train.micro_batch_tokens = {limit:,})"
        shown = ", ".join(f"{name} ({tokens:,} tokens)" for name, tokens in rows[:_MOST_ROWS])
        more = f" and {len(rows) - _MOST_ROWS} more" if len(rows) > _MOST_ROWS else ""
        raise TrainingError(
            f"out of memory {what}: a forward over {len(rows)} row{'s' if len(rows) != 1 else ''} and {total:,} "
            f"tokens{setting}: {shown}{more}. "
            f"{_remedy(rows, limit, packed=packed, can_recompute=backward is False)}. {_first_line(error)}"
        ) from error


@contextlib.contextmanager
def memory_for_state(what: str, remedy: str) -> Iterator[None]:
    """Work whose memory no row decides. Raises: TrainingError with ``remedy``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"out of memory {what}. {remedy}. {_first_line(error)}") from error


OPTIMIZER_REMEDY = (
    "The optimizer's state is what is new there, and no row changes its size: share it between more processes or "
    "keep it in host memory (accelerate_configs/zero2.yaml, zero2_offload.yaml, zero3_offload.yaml), or train an "
    "adapter (peft)"
)


def _remedy(rows: list[tuple[str, int]], limit: int, *, packed: bool, can_recompute: bool) -> str:
    longest = max(tokens for _, tokens in rows)
    also = ", or set train.gradient_checkpointing = true" if can_recompute else ""
    if len(rows) > 1:
        fewer = max(longest, min(limit, sum(tokens for _, tokens in rows)) // 2)
        return f"Set train.micro_batch_tokens = {fewer} (the result is the same){also}"
    instead = "set train.gradient_checkpointing = true, or " if can_recompute else ""
    layout = "" if packed else ", or model.layout = packed where the model can take it"
    return (
        f"It is one row alone, which no smaller forward can split: {instead}lower data.max_length_tokens (or "
        f"regime.max_new_tokens) below it{layout}, or give the weights less of the memory "
        "(accelerate_configs/zero3.yaml, zero3_offload.yaml; peft)"
    )


def _tokens(group: Group, packed: bool) -> int:
    if packed:
        return group.num_tokens
    longest = max(len(response.ids) for response in group.responses)
    return (len(group.prompt_ids) + longest) * len(group.responses)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
